//! Ranks as threads of one process, connected by channels. They serve tests, rehearsals of many ranks on one device, and
//! devices whose process groups refuse two ranks on one device.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use burn_tensor::{Device, Tensor};

use super::{Comm, Pending, catch_panic};
use crate::{Error, Result};

type Message = Vec<Tensor<1>>;

/// A rank's end of a group of threads.
pub struct ThreadGroup {
    rank: usize,
    /// The world rank of the group's rank 0.
    first: usize,
    /// Channels to each rank, and from each.
    to: Vec<Sender<Message>>,
    from: Vec<Mutex<Receiver<Message>>>,
    shared: Arc<Shared>,
}

/// State that all ranks of all groups share.
struct Shared {
    /// The first failure: its rank and message.
    failed: Mutex<Option<(usize, String)>>,
    timeout: Duration,
}

/// How often a waiting rank checks whether another one failed.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

impl Shared {
    fn failure(&self) -> Option<(usize, String)> {
        self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

impl ThreadGroup {
    /// Creates all ends of a group.
    fn group(first: usize, size: usize, shared: &Arc<Shared>) -> Vec<Self> {
        let end = |rank| Self { rank, first, to: vec![], from: vec![], shared: shared.clone() };
        let mut ends: Vec<Self> = (0..size).map(end).collect();
        for from in 0..size {
            for to in 0..size {
                let (sender, receiver) = channel();
                ends[from].to.push(sender);
                ends[to].from.push(Mutex::new(receiver));
            }
        }
        ends
    }

    /// Records this rank's failure, which makes the calls of all other ranks fail. The first failure counts.
    fn record_failure(&self, why: &str) {
        let mut failed = self.shared.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        failed.get_or_insert((self.first + self.rank, why.to_owned()));
    }

    fn send(&self, to: usize, message: Message) {
        // If the other rank is gone, it has recorded its failure, or `receive` notices it.
        let _ = self.to[to].send(message);
    }

    fn receive(&self, from: usize, doing: &'static str) -> Result<Message> {
        let receiver = self.from[from].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let started = Instant::now();
        loop {
            match receiver.recv_timeout(POLL_INTERVAL) {
                Ok(message) => return Ok(message),
                Err(reason) => {
                    let (rank, from) = (self.first + self.rank, self.first + from);
                    if let Some((rank, message)) = self.shared.failure() {
                        return Err(Error::Rank { rank, message });
                    }
                    let message = if reason == RecvTimeoutError::Disconnected {
                        format!("rank {from} is gone; rank {rank} waited for it in {doing}")
                    } else if started.elapsed() > self.shared.timeout {
                        let seconds = started.elapsed().as_secs();
                        format!("rank {rank} has waited {seconds} s for rank {from} in {doing}")
                    } else {
                        continue;
                    };
                    self.record_failure(&message);
                    return Err(Error::Rank { rank, message });
                }
            }
        }
    }

    /// Sends a tensor to each rank, and receives one from each, in the order of ranks.
    fn all_to_all(&self, messages: Vec<Tensor<1>>, doing: &'static str) -> Result<Vec<Tensor<1>>> {
        for (to, message) in messages.into_iter().enumerate() {
            self.send(to, vec![message]);
        }
        let one = |from| Ok(self.receive(from, doing)?.swap_remove(0));
        (0..self.size()).map(one).collect()
    }
}

impl Comm for ThreadGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn exchange(&self, to: usize, from: usize, tensors: Vec<Tensor<1>>) -> Result<Pending<'_>> {
        let device = tensors.first().map(Tensor::device);
        self.send(to, tensors);
        Ok(Box::new(move || {
            let received = self.receive(from, "exchange")?;
            Ok(device.map_or(vec![], |device| on_device(received, &device)))
        }))
    }

    fn all_gather(&self, tensor: Tensor<1>) -> Result<Tensor<1>> {
        if self.size() == 1 {
            return Ok(tensor);
        }
        let device = tensor.device();
        let parts = on_device(self.all_to_all(vec![tensor; self.size()], "all-gather")?, &device);
        // Keep the parts until they are copied. LibTorch's `cat` drops its inputs first, and a rank that holds the last
        // reference to its tensor may write into it.
        let all = Tensor::cat(parts.clone(), 0);
        drop(parts);
        Ok(all)
    }

    fn reduce_scatter(&self, tensor: Tensor<1>) -> Result<Tensor<1>> {
        if self.size() == 1 {
            return Ok(tensor);
        }
        let (part, device) = (tensor.dims()[0] / self.size(), tensor.device());
        let parts = (0..self.size()).map(|to| tensor.clone().narrow(0, to * part, part)).collect();
        Ok(sum(on_device(self.all_to_all(parts, "reduce-scatter")?, &device)))
    }

    fn all_reduce(&self, tensor: Tensor<1>) -> Result<Tensor<1>> {
        let device = tensor.device();
        Ok(sum(on_device(self.all_to_all(vec![tensor; self.size()], "all-reduce")?, &device)))
    }

    fn barrier(&self) -> Result<()> {
        for to in 0..self.size() {
            self.send(to, vec![]);
        }
        (0..self.size()).try_for_each(|from| self.receive(from, "barrier").map(drop))
    }
}

/// Makes glibc return the memory of freed tensors to the system at once, at some cost in time. By default it keeps up to
/// 32 MB blocks for the thread that freed them, so each rank would keep its peak memory.
fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // Safety: this only sets parameters of the allocator
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
    }
}

/// Moves tensors of other ranks to this rank's device.
fn on_device(tensors: Vec<Tensor<1>>, device: &Device) -> Vec<Tensor<1>> {
    tensors.into_iter().map(|tensor| tensor.to_device(device)).collect()
}

fn sum(tensors: Vec<Tensor<1>>) -> Tensor<1> {
    tensors.into_iter().reduce(|sum, more| sum + more).expect("a group has a rank")
}

/// Runs `work` on a thread for each of `ranks` ranks, and returns their results in order. `work` receives the rank's end of
/// the group of all ranks, and of its group of `sequence_ranks` neighbours. A rank that waits longer than `timeout` fails.
///
/// # Errors
/// Returns the error of the rank that failed first; the other ranks end, too. A panic is a failure.
pub fn run<T: Send>(
    ranks: usize,
    sequence_ranks: usize,
    timeout: Duration,
    work: impl Fn(&dyn Comm, &dyn Comm) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    if ranks > 1 {
        return_freed_memory();
    }
    let shared = Arc::new(Shared { failed: Mutex::default(), timeout });
    let world = ThreadGroup::group(0, ranks, &shared);
    let neighbours = (0..ranks).step_by(sequence_ranks.max(1));
    let groups =
        neighbours.flat_map(|first| ThreadGroup::group(first, sequence_ranks.min(ranks - first), &shared));
    let work = &work;
    let results: Vec<Result<T>> = std::thread::scope(|scope| {
        let rank = |(world, sequence): (ThreadGroup, ThreadGroup)| {
            scope.spawn(move || {
                let result = catch_panic(world.rank, || work(&world, &sequence));
                if let Err(error) = &result {
                    world.record_failure(&error.to_string());
                }
                result
            })
        };
        let threads: Vec<_> = world.into_iter().zip(groups).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's panics are caught")).collect()
    });
    let first = shared.failure().map(|(rank, _)| rank);
    let mut returned = vec![];
    let mut errors = vec![];
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok(value) => returned.push(value),
            Err(error) => errors.push((Some(rank) != first, error)),
        }
    }
    // The rank that failed first has the most precise message.
    errors.sort_by_key(|(later, _)| *later);
    match errors.into_iter().next() {
        Some((_, error)) => Err(error),
        None => Ok(returned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn tensor(values: impl IntoIterator<Item = f32>) -> Tensor<1> {
        let values: Vec<f32> = values.into_iter().collect();
        Tensor::from_floats(values.as_slice(), &Device::flex())
    }

    fn values(tensor: Tensor<1>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn every_rank_gets_what_the_others_have() {
        for ranks in [1, 2, 3, 5] {
            let results = run(ranks, 1, TIMEOUT, |comm, _| {
                let rank = comm.rank() as f32;
                comm.barrier()?;
                let gathered = values(comm.all_gather(tensor([rank, rank + 0.5]))?);
                let whole = tensor((0..2 * ranks).map(|i| i as f32 * (rank + 1.0)));
                let part = values(comm.reduce_scatter(whole)?);
                let sum = values(comm.all_reduce(tensor([rank, 1.0]))?);
                let (to, from) = ((comm.rank() + 1) % ranks, (comm.rank() + ranks - 1) % ranks);
                let pending = comm.exchange(to, from, vec![tensor([rank]), tensor([7.0])])?;
                let passed: Vec<Vec<f32>> = pending()?.into_iter().map(values).collect();
                Ok((gathered, part, sum, passed))
            });
            let total: f32 = (0..ranks).map(|r| r as f32).sum();
            for (rank, (gathered, part, sum, passed)) in results.unwrap().into_iter().enumerate() {
                let all: Vec<f32> = (0..ranks).flat_map(|r| [r as f32, r as f32 + 0.5]).collect();
                assert_eq!(gathered, all);
                let factor = total + ranks as f32;
                assert_eq!(part, [2.0 * rank as f32 * factor, (2.0 * rank as f32 + 1.0) * factor]);
                assert_eq!(sum, [total, ranks as f32]);
                assert_eq!(passed, [vec![((rank + ranks - 1) % ranks) as f32], vec![7.0]]);
            }
        }
    }

    #[test]
    fn a_rank_that_fails_or_panics_ends_the_others_with_its_error() {
        for panics in [false, true] {
            let started = Instant::now();
            let error = run(3, 3, TIMEOUT, |_, comm| {
                if comm.rank() == 1 {
                    assert!(!panics, "rank one panics");
                    return Err(Error::Conf("rank one fails".into()));
                }
                comm.all_reduce(tensor([1.0])).map(drop)
            });
            let error = error.unwrap_err().to_string();
            assert!(error.contains(if panics { "rank one panics" } else { "rank one fails" }), "{error}");
            assert!(started.elapsed() < TIMEOUT / 2);
        }
    }

    #[test]
    fn neighbours_share_a_sequence() {
        let sums = run(6, 2, TIMEOUT, |world, sequence| {
            let own = tensor([world.rank() as f32]);
            Ok((sequence.rank(), values(sequence.all_reduce(own)?)[0]))
        });
        assert_eq!(sums.unwrap(), [(0, 1.0), (1, 1.0), (0, 5.0), (1, 5.0), (0, 9.0), (1, 9.0)]);
    }

    #[test]
    fn a_rank_that_waits_too_long_is_named_with_what_it_waits_for() {
        let error = run(2, 2, Duration::from_millis(100), |comm, _| match comm.rank() {
            0 => comm.barrier(),
            _ => {
                std::thread::sleep(Duration::from_millis(400));
                Ok(())
            }
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("rank 0 has waited") && error.contains("for rank 1 in barrier"), "{error}");
    }
}
