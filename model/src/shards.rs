//! ZeRO-3 sharding: parameters, gradients and optimizer state are split evenly over all ranks, unit by unit (the embedding,
//! each layer, the head). A unit is a flat list of numbers, of which each rank owns an equal shard, in f32.

use std::ops::Range;

use burn_tensor::{DType, Device, FloatDType, Tensor, TensorData};

use crate::Result;
use crate::comm::Comm;
use crate::config::Config;

/// The layout of a unit's parameters.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Names and shapes in order, norms first.
    pub parameters: Vec<(String, [usize; 2])>,
    /// How many numbers the parameters have. Shards are rounded up; the last ones end in zeros.
    pub length: usize,
    /// How many of the first numbers belong to norms, which have no weight decay.
    pub norms: usize,
}

impl Unit {
    pub fn all(config: &Config) -> Vec<Self> {
        let size = |(_, [rows, columns]): &(String, [usize; 2])| rows * columns;
        let unit = |parameters: Vec<(String, [usize; 2])>| Self {
            length: parameters.iter().map(size).sum(),
            norms: parameters.iter().filter(|(name, _)| name.contains("norm")).map(size).sum(),
            parameters,
        };
        config.units().into_iter().map(unit).collect()
    }

    /// The length of a shard, padding included.
    pub fn shard_length(&self, ranks: usize) -> usize {
        self.length.div_ceil(ranks)
    }

    /// The unit's numbers in a rank's shard.
    pub fn shard_range(&self, rank: usize, ranks: usize) -> Range<usize> {
        let part = self.shard_length(ranks);
        (rank * part).min(self.length)..((rank + 1) * part).min(self.length)
    }

    /// The unit's parameters, from all its numbers.
    pub fn unflatten(&self, flat: Tensor<1>) -> Vec<Tensor<2>> {
        let mut from = 0;
        let one = |(_, shape): &(String, [usize; 2])| {
            let length = shape[0] * shape[1];
            from += length;
            flat.clone().narrow(0, from - length, length).reshape(*shape)
        };
        self.parameters.iter().map(one).collect()
    }
}

/// One rank's shards of all units.
pub struct Shards {
    pub units: Vec<Unit>,
    /// The shard `[shard_length]` of each unit, f32.
    pub owned: Vec<Tensor<1>>,
}

impl Shards {
    /// `read` returns the numbers in a range of a unit, by its index.
    pub fn new(
        units: Vec<Unit>,
        comm: &dyn Comm,
        device: &Device,
        mut read: impl FnMut(usize, Range<usize>) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let mut owned = vec![];
        for (i, unit) in units.iter().enumerate() {
            let mut values = read(i, unit.shard_range(comm.rank(), comm.size()))?;
            let part = unit.shard_length(comm.size());
            values.resize(part, 0.0);
            owned.push(Tensor::from_data(TensorData::new(values, [part]), device));
        }
        Ok(Self { units, owned })
    }

    /// All parameters of a unit, in the type of matrix products.
    pub fn all_gather(&self, comm: &dyn Comm, unit: usize, precision: FloatDType) -> Result<Vec<Tensor<2>>> {
        let own = self.owned[unit].clone().cast(precision);
        Ok(self.units[unit].unflatten(comm.all_gather(own)?))
    }

    /// This rank's shard of the sum over ranks of a unit's gradients, in f32.
    pub fn reduce_scatter(
        &self,
        comm: &dyn Comm,
        unit: usize,
        gradients: Vec<Tensor<2>>,
    ) -> Result<Tensor<1>> {
        let unit = &self.units[unit];
        let flat = |tensor: Tensor<2>| tensor.cast(FloatDType::F32).reshape([-1]);
        let mut all: Vec<Tensor<1>> = gradients.into_iter().map(flat).collect();
        let padding = unit.shard_length(comm.size()) * comm.size() - unit.length;
        if padding > 0 {
            all.push(Tensor::zeros([padding], (&all[0].device(), DType::F32)));
        }
        comm.reduce_scatter(Tensor::cat(all, 0))
    }
}
