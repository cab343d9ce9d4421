//! How ranks talk to each other. What goes over is flat; the shapes are known on both sides.

#[cfg(feature = "libtorch")]
pub mod c10d;
pub mod threads;

use std::time::Duration;

use burn_tensor::Tensor;

use crate::conf::TrainConf;
use crate::{Error, Result};

/// One rank's end of a group of ranks. Every call but [`exchange`](Comm::exchange) is made by all ranks of the group, in
/// the same order; a rank that fails fails the calls of the others, so that none waits for ever.
pub trait Comm: Send + Sync {
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Sends tensors to one rank, and receives as many of the same lengths and types from another. Sending begins at once;
    /// what is returned waits for what comes in.
    fn exchange(&self, to: usize, from: usize, tensors: Vec<Tensor<1>>) -> Result<Pending<'_>>;

    /// Every rank's tensor, one after the other.
    fn all_gather(&self, tensor: Tensor<1>) -> Result<Tensor<1>>;

    /// This rank's part, of as many equal parts as ranks, of the sum of all ranks' tensors.
    fn reduce_scatter(&self, tensor: Tensor<1>) -> Result<Tensor<1>>;

    /// The sum of all ranks' tensors, the same bits on every rank.
    fn all_reduce(&self, tensor: Tensor<1>) -> Result<Tensor<1>>;

    /// Returns when all ranks have called it.
    fn barrier(&self) -> Result<()>;
}

/// What an exchange is waited for with.
pub type Pending<'a> = Box<dyn FnOnce() -> Result<Vec<Tensor<1>>> + 'a>;

/// Which rank a process is, of how many, and where they meet: the variables that every launcher of PyTorch jobs sets.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub rank: usize,
    pub size: usize,
    /// Among those of its machine: which device is its own.
    pub local: usize,
    pub host: String,
    pub port: u16,
    /// Whether the launcher itself serves the meeting place.
    pub served: bool,
    /// How often the launcher has started the processes before.
    pub attempt: usize,
}

impl Place {
    /// `None` where this process was not started as one of several.
    pub fn of_this_process() -> Result<Option<Self>> {
        Self::from(&|name| std::env::var(name).ok())
    }

    fn from(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = get(name) else { return Ok(None) };
            let wrong = || Error::Conf(format!("{name}=`{text}` in the environment is not a number"));
            text.parse().map(Some).map_err(|_| wrong())
        };
        let Some(size) = number("WORLD_SIZE")? else { return Ok(None) };
        let needed =
            |name: &str| Error::Conf(format!("WORLD_SIZE is set, but not {name}; a launcher sets both"));
        let rank = number("RANK")?.ok_or_else(|| needed("RANK"))?;
        if rank >= size {
            return Err(Error::Conf(format!("RANK={rank} is not below WORLD_SIZE={size}")));
        }
        let port = number("MASTER_PORT")?.ok_or_else(|| needed("MASTER_PORT"))?;
        Ok(Some(Self {
            rank,
            size,
            local: number("LOCAL_RANK")?.unwrap_or(rank),
            host: get("MASTER_ADDR").ok_or_else(|| needed("MASTER_ADDR"))?,
            port: u16::try_from(port).map_err(|_| Error::Conf(format!("MASTER_PORT={port} is no port")))?,
            served: get("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True"),
            attempt: number("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0),
        }))
    }
}

/// A rank that waits for longer than this for another one says so and fails.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// What `work` returns; a panic in it is the rank's failure.
fn caught<T>(rank: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    worked.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Error::Rank { rank, message: format!("it panicked: {text}") })
    })
}

/// Runs `work` as the one rank that this process is, of several.
#[cfg_attr(not(feature = "libtorch"), allow(unused_variables))]
pub fn process<T>(
    place: Place,
    conf: &TrainConf,
    work: impl FnOnce(&dyn Comm, &dyn Comm) -> Result<T>,
) -> Result<T> {
    let size = place.size;
    let device = conf.device_of(place.local)?;
    if conf.ranks.is_some_and(|ranks| ranks != size) {
        let ranks = conf.ranks();
        return Err(Error::Conf(format!("train.ranks is {ranks}, and WORLD_SIZE={size} in the environment")));
    }
    let sequence_ranks = conf.sequence_ranks.unwrap_or(size);
    if !size.is_multiple_of(sequence_ranks) {
        return Err(Error::Conf(format!(
            "train.sequence_ranks is {sequence_ranks}, which does not divide WORLD_SIZE={size}"
        )));
    }
    #[cfg(feature = "libtorch")]
    {
        if device == crate::device::Name::Flex {
            let help =
                "ranks as processes are for LibTorch's devices; name \"libtorch-cpu\" or \"libtorch-cuda:0\"";
            return Err(Error::Conf(format!(
                "train.devices: {help}, or start one process with train.ranks = {size}"
            )));
        }
        c10d::Processes::open(place, device, PATIENCE)?.run(sequence_ranks, work)
    }
    #[cfg(not(feature = "libtorch"))]
    Err(Error::Rank {
        rank: place.rank,
        message:
            "ranks as processes need LibTorch, and this build is without; build with --features libtorch"
                .into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> Result<Option<Place>> {
        Place::from(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn a_process_knows_its_place_from_what_launchers_set() {
        assert_eq!(place(&[("RANK", "1")]).unwrap(), None);
        let all = [
            ("WORLD_SIZE", "4"),
            ("RANK", "3"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "h"),
            ("MASTER_PORT", "29500"),
        ];
        let there = place(&all).unwrap().unwrap();
        assert_eq!((there.rank, there.size, there.local, there.port, there.served), (3, 4, 1, 29500, false));
        for (missing, message) in [(1, "not RANK"), (3, "not MASTER_ADDR"), (4, "not MASTER_PORT")] {
            let mut some = all.to_vec();
            some.remove(missing);
            assert!(place(&some).unwrap_err().to_string().contains(message));
        }
        let beyond = place(&[("WORLD_SIZE", "2"), ("RANK", "2")]).unwrap_err().to_string();
        assert!(beyond.contains("RANK=2 is not below WORLD_SIZE=2"));
        assert!(place(&[("WORLD_SIZE", "two")]).unwrap_err().to_string().contains("is not a number"));
    }
}
