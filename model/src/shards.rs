//! ZeRO-3: parameters, gradients and optimizer state split evenly over all ranks, unit by unit (the embedding, a layer, the
//! head). A unit is one flat run of numbers; a rank owns an equal part of each, in f32.

use std::ops::Range;

use burn_tensor::{DType, Device, FloatDType, Tensor, TensorData};

use crate::Result;
use crate::comm::Comm;
use crate::config::Config;

/// How a unit's parameters lie in its flat run.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Names and shapes, in the order in which they lie; norms first.
    pub parameters: Vec<(String, [usize; 2])>,
    /// Of all parameters; what a rank owns is rounded up, and the last rank's has zeros at the end.
    pub length: usize,
    /// How many of the first numbers are norms', which don't decay.
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

    /// How many numbers each of so many ranks owns.
    pub fn part(&self, ranks: usize) -> usize {
        self.length.div_ceil(ranks)
    }

    /// What a rank owns.
    pub fn owned(&self, rank: usize, ranks: usize) -> Range<usize> {
        let part = self.part(ranks);
        (rank * part).min(self.length)..((rank + 1) * part).min(self.length)
    }

    /// The whole unit's parameters out of its flat run.
    pub fn parameters(&self, flat: Tensor<1>) -> Vec<Tensor<2>> {
        let mut from = 0;
        let one = |(_, shape): &(String, [usize; 2])| {
            let length = shape[0] * shape[1];
            from += length;
            flat.clone().narrow(0, from - length, length).reshape(*shape)
        };
        self.parameters.iter().map(one).collect()
    }
}

/// What one rank owns of all units.
pub struct Shards {
    pub units: Vec<Unit>,
    /// `[part]` of each unit, f32.
    pub owned: Vec<Tensor<1>>,
}

impl Shards {
    /// Of a unit's numbers, `read` gives those in a range.
    pub fn new(
        units: Vec<Unit>,
        comm: &dyn Comm,
        device: &Device,
        mut read: impl FnMut(usize, Range<usize>) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let mut owned = vec![];
        for (i, unit) in units.iter().enumerate() {
            let mut values = read(i, unit.owned(comm.rank(), comm.size()))?;
            let part = unit.part(comm.size());
            values.resize(part, 0.0);
            owned.push(Tensor::from_data(TensorData::new(values, [part]), device));
        }
        Ok(Self { units, owned })
    }

    /// A unit's parameters, whole, in the type that is computed in.
    pub fn gather(&self, comm: &dyn Comm, unit: usize, precision: FloatDType) -> Result<Vec<Tensor<2>>> {
        let own = self.owned[unit].clone().cast(precision);
        Ok(self.units[unit].parameters(comm.all_gather(own)?))
    }

    /// This rank's part of the sum over ranks of a unit's gradients, in f32.
    pub fn reduce(&self, comm: &dyn Comm, unit: usize, gradients: Vec<Tensor<2>>) -> Result<Tensor<1>> {
        let unit = &self.units[unit];
        let flat = |tensor: Tensor<2>| tensor.cast(FloatDType::F32).reshape([-1]);
        let mut all: Vec<Tensor<1>> = gradients.into_iter().map(flat).collect();
        let more = unit.part(comm.size()) * comm.size() - unit.length;
        if more > 0 {
            all.push(Tensor::zeros([more], (&all[0].device(), DType::F32)));
        }
        comm.reduce_scatter(Tensor::cat(all, 0))
    }
}
