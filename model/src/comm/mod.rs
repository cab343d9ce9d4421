//! Communication between ranks. Tensors are sent flat; both sides know their shapes.

#[cfg(feature = "libtorch")]
pub mod c10d;
pub mod threads;

use std::time::Duration;

use burn_tensor::Tensor;

use crate::conf::TrainConf;
use crate::{Error, Result};

/// One rank's end of a process group. All ranks of the group make every call but [`exchange`](Comm::exchange), in the same
/// order. When a rank fails, the calls of the others fail too, so that no rank waits for ever.
pub trait Comm: Send + Sync {
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Sends tensors to one rank, and receives as many of the same lengths and types from another. Sending begins at once;
    /// the result waits for what is received.
    fn exchange(&self, to: usize, from: usize, tensors: Vec<Tensor<1>>) -> Result<Pending<'_>>;

    /// The concatenation of all ranks' tensors.
    fn all_gather(&self, tensor: Tensor<1>) -> Result<Tensor<1>>;

    /// This rank's shard of the sum of all ranks' tensors, which is split into as many equal shards as ranks.
    fn reduce_scatter(&self, tensor: Tensor<1>) -> Result<Tensor<1>>;

    /// The sum of all ranks' tensors, the same bits on every rank.
    fn all_reduce(&self, tensor: Tensor<1>) -> Result<Tensor<1>>;

    /// Returns when all ranks have called it.
    fn barrier(&self) -> Result<()>;
}

/// Waits for an exchange to finish, and returns the tensors received.
pub type Pending<'a> = Box<dyn FnOnce() -> Result<Vec<Tensor<1>>> + 'a>;

/// The environment variables that every launcher of PyTorch jobs sets: which rank this process is, of how many, and where
/// the ranks meet.
#[derive(Clone, Debug, PartialEq)]
pub struct LaunchEnv {
    pub rank: usize,
    pub world_size: usize,
    /// The rank among those of its machine, which selects the device.
    pub local_rank: usize,
    pub master_addr: String,
    pub master_port: u16,
    /// Whether the launcher itself serves the rendezvous store.
    pub agent_store: bool,
    /// How often the launcher has restarted the processes.
    pub restart_count: usize,
}

impl LaunchEnv {
    /// `None` if this process was not started as one rank of several.
    pub fn from_env() -> Result<Option<Self>> {
        Self::parse(&|name| std::env::var(name).ok())
    }

    fn parse(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
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
            world_size: size,
            local_rank: number("LOCAL_RANK")?.unwrap_or(rank),
            master_addr: get("MASTER_ADDR").ok_or_else(|| needed("MASTER_ADDR"))?,
            master_port: u16::try_from(port)
                .map_err(|_| Error::Conf(format!("MASTER_PORT={port} is no port")))?,
            agent_store: get("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True"),
            restart_count: number("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0),
        }))
    }
}

/// A rank that waits longer than this for another one fails.
pub const TIMEOUT: Duration = Duration::from_secs(600);

/// Runs `work` and turns a panic into an error of the rank.
fn catch_panic<T>(rank: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    worked.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Error::Rank { rank, message: format!("it panicked: {text}") })
    })
}

/// Runs `work` as the rank that this process is.
#[cfg_attr(not(feature = "libtorch"), allow(unused_variables))]
pub fn run_process<T>(
    launch: LaunchEnv,
    conf: &TrainConf,
    work: impl FnOnce(&dyn Comm, &dyn Comm) -> Result<T>,
) -> Result<T> {
    let size = launch.world_size;
    let device = conf.device_of(launch.local_rank)?;
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
        if device == crate::device::DeviceName::Flex {
            let help =
                "ranks as processes are for LibTorch's devices; name \"libtorch-cpu\" or \"libtorch-cuda:0\"";
            return Err(Error::Conf(format!(
                "train.devices: {help}, or start one process with train.ranks = {size}"
            )));
        }
        c10d::ProcessGroups::open(launch, device, TIMEOUT)?.run(sequence_ranks, work)
    }
    #[cfg(not(feature = "libtorch"))]
    Err(Error::Rank {
        rank: launch.rank,
        message:
            "ranks as processes need LibTorch, and this build is without; build with --features libtorch"
                .into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Option<LaunchEnv>> {
        LaunchEnv::parse(&|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn a_process_reads_its_rank_from_the_launchers_environment() {
        assert_eq!(launch(&[("RANK", "1")]).unwrap(), None);
        let all = [
            ("WORLD_SIZE", "4"),
            ("RANK", "3"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "h"),
            ("MASTER_PORT", "29500"),
        ];
        let there = launch(&all).unwrap().unwrap();
        assert_eq!(
            (there.rank, there.world_size, there.local_rank, there.master_port, there.agent_store),
            (3, 4, 1, 29500, false)
        );
        for (missing, message) in [(1, "not RANK"), (3, "not MASTER_ADDR"), (4, "not MASTER_PORT")] {
            let mut some = all.to_vec();
            some.remove(missing);
            assert!(launch(&some).unwrap_err().to_string().contains(message));
        }
        let beyond = launch(&[("WORLD_SIZE", "2"), ("RANK", "2")]).unwrap_err().to_string();
        assert!(beyond.contains("RANK=2 is not below WORLD_SIZE=2"));
        assert!(launch(&[("WORLD_SIZE", "two")]).unwrap_err().to_string().contains("is not a number"));
    }
}
