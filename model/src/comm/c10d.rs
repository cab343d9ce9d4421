//! Ranks as processes, connected by LibTorch's process groups: Gloo on CPUs, NCCL on GPUs. Each rank is a process, on one
//! node or many. Any launcher of PyTorch jobs can start them: it sets `MASTER_ADDR`, `MASTER_PORT`, `RANK`, `WORLD_SIZE` and
//! `LOCAL_RANK`.

#![allow(deprecated)] // burn 0.22.1 is pinned as the last release with LibTorch

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn_tch::{LibTorch, TchTensor};
use burn_tensor::Tensor;
use tch::{Kind, Tensor as Torch};

use super::{Comm, LaunchEnv, Pending, catch_panic};
use crate::device::DeviceName;
use crate::{Error, Result};

type TorchPointer = *mut std::ffi::c_void;

#[allow(clippy::upper_case_acronyms)]
mod ffi {
    use super::{TorchPointer, c_char, c_int};

    #[repr(C)]
    pub struct Store(u8);
    #[repr(C)]
    pub struct Group(u8);
    #[repr(C)]
    pub struct Pending(u8);

    unsafe extern "C" {
        pub fn lw_error() -> *const c_char;
        pub fn lw_store_open(
            host: *const c_char,
            port: u16,
            server: c_int,
            timeout: i64,
            out: *mut *mut Store,
        ) -> c_int;
        pub fn lw_store_set(store: *mut Store, key: *const c_char, value: *const c_char) -> c_int;
        pub fn lw_store_get(
            store: *mut Store,
            key: *const c_char,
            value: *mut c_char,
            room: i64,
            length: *mut i64,
        ) -> c_int;
        pub fn lw_store_close(store: *mut Store);
        pub fn lw_group_open(
            store: *mut Store,
            backend: *const c_char,
            name: *const c_char,
            rank: c_int,
            size: c_int,
            timeout: i64,
            out: *mut *mut Group,
        ) -> c_int;
        pub fn lw_group_close(group: *mut Group);
        pub fn lw_all_gather(group: *mut Group, input: TorchPointer, out: TorchPointer) -> c_int;
        pub fn lw_reduce_scatter(group: *mut Group, input: TorchPointer, out: TorchPointer) -> c_int;
        pub fn lw_all_reduce(group: *mut Group, tensor: TorchPointer) -> c_int;
        pub fn lw_barrier(group: *mut Group) -> c_int;
        pub fn lw_exchange(
            group: *mut Group,
            to: c_int,
            from: c_int,
            tag_to: c_int,
            tag_from: c_int,
            n: c_int,
            input: *mut TorchPointer,
            out: *mut TorchPointer,
            pending: *mut *mut Pending,
        ) -> c_int;
        pub fn lw_wait(pending: *mut Pending) -> c_int;
    }
}

/// This process's connection to the others, from which its groups are made.
pub struct ProcessGroups {
    launch: LaunchEnv,
    backend: CString,
    timeout: Duration,
    /// The rendezvous store, for the groups and for reporting failures.
    store: *mut ffi::Store,
    /// A second connection to it for [`monitor`](Self::monitor), because a connection serves one call at a time.
    monitor_store: *mut ffi::Store,
    /// The last operation that this rank began.
    doing: Mutex<&'static str>,
}

/// A process's end of one group.
pub struct Group<'a> {
    rank: usize,
    size: usize,
    processes: &'a ProcessGroups,
    group: Mutex<*mut ffi::Group>,
    /// How many messages were sent to and received from each rank so far, which are the next tags.
    sent: Vec<Cell<c_int>>,
    received: Vec<Cell<c_int>>,
}

// Safety: the pointers are LibTorch's thread-safe objects, and a rank's calls come from one thread at a time.
unsafe impl Send for ProcessGroups {}
unsafe impl Sync for ProcessGroups {}
unsafe impl Send for Group<'_> {}
unsafe impl Sync for Group<'_> {}

fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).expect("there is no NUL left")
}

/// LibTorch's last error message, without its C++ stack.
fn last_error() -> String {
    // Safety: the message lives until this thread's next call
    let all = unsafe { CStr::from_ptr(ffi::lw_error()) }.to_string_lossy().into_owned();
    all.lines().next().unwrap_or_default().to_owned()
}

/// How often a process writes its heartbeat.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);

/// A process without a heartbeat for this long is gone.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long after another rank's failure this process may take to end. A GPU waits for a missing rank without limit.
const EXIT_GRACE: Duration = Duration::from_secs(15);

/// The exit code of a process that is ended so, which is that of a failed training.
const EXIT_CODE: i32 = 6;

/// How long a rank whose call failed waits to learn which rank failed first.
const FAILURE_WAIT: Duration = Duration::from_secs(8);

impl ProcessGroups {
    /// Connects to the other processes.
    pub fn open(launch: LaunchEnv, device: DeviceName, timeout: Duration) -> Result<Self> {
        let backend = match device {
            DeviceName::LibtorchCuda(_) => "nccl",
            _ => "gloo",
        };
        let host = c_string(&launch.master_addr);
        let timeout_ms = timeout.as_millis() as i64;
        let open = |serves: bool| {
            let mut store = null_mut();
            // Safety: the pointers are to live values
            let code = unsafe {
                ffi::lw_store_open(host.as_ptr(), launch.master_port, serves.into(), timeout_ms, &mut store)
            };
            if code == 0 {
                return Ok(store);
            }
            let message = format!(
                "cannot meet the other ranks at {}:{}: {}",
                launch.master_addr,
                launch.master_port,
                last_error()
            );
            Err(Error::Rank { rank: launch.rank, message })
        };
        let store = open(launch.rank == 0 && !launch.agent_store)?;
        let monitor_store = open(false)?;
        Ok(Self {
            backend: c_string(backend),
            timeout,
            store,
            monitor_store,
            doing: Mutex::new("start"),
            launch,
        })
    }

    /// A key of this attempt. A launcher's store outlives the processes that it restarts.
    fn key(&self, what: &str) -> CString {
        c_string(&format!("lengthwise/{}/{what}", self.launch.restart_count))
    }

    /// The key of the first failure: its rank and message.
    fn failure_key(&self) -> CString {
        self.key("failed")
    }

    /// The key of a rank's heartbeat.
    fn heartbeat_key(&self, rank: usize) -> CString {
        self.key(&format!("beat/{rank}"))
    }

    /// This process's end of a group of `size` ranks that starts at rank `first`.
    pub fn group(&self, name: &str, first: usize, size: usize) -> Result<Group<'_>> {
        let rank = self.launch.rank - first;
        let mut group = null_mut();
        // Safety: the store lives as long as `self`
        let code = unsafe {
            ffi::lw_group_open(
                self.store,
                self.backend.as_ptr(),
                self.key(&format!("{name}/{first}")).as_ptr(),
                rank as c_int,
                size as c_int,
                self.timeout.as_millis() as i64,
                &mut group,
            )
        };
        if code != 0 {
            return Err(self.first_failure(last_error()));
        }
        let counters = || (0..size).map(|_| Cell::new(0)).collect();
        let (sent, received) = (counters(), counters());
        Ok(Group { rank, size, processes: self, group: Mutex::new(group), sent, received })
    }

    /// Tells all ranks that one failed. The first failure counts.
    fn report_failure(&self, store: *mut ffi::Store, rank: usize, message: &str) {
        if let Ok(None) = self.get(store, &self.failure_key()) {
            self.set(store, &self.failure_key(), &format!("{rank} {message}"));
        }
    }

    /// Ignores errors: the next read from the store reports them.
    fn set(&self, store: *mut ffi::Store, key: &CString, value: &str) {
        // Safety: the store lives as long as `self`
        unsafe { ffi::lw_store_set(store, key.as_ptr(), c_string(value).as_ptr()) };
    }

    /// # Errors
    /// The store is gone.
    fn get(&self, store: *mut ffi::Store, key: &CString) -> Result<Option<String>, String> {
        let mut value = vec![0u8; 4096];
        let mut length = -1;
        // Safety: the buffer has as much room as the call is told
        let code = unsafe {
            let room = value.len() as i64;
            ffi::lw_store_get(store, key.as_ptr(), value.as_mut_ptr().cast(), room, &mut length)
        };
        if code != 0 {
            return Err(last_error());
        }
        let Ok(length) = usize::try_from(length) else { return Ok(None) };
        value.truncate(length);
        Ok(Some(String::from_utf8_lossy(&value).into_owned()))
    }

    /// The first failure, if there is one.
    fn failure(&self, store: *mut ffi::Store) -> Option<Error> {
        match self.get(store, &self.failure_key()) {
            Ok(report) => {
                let report = report?;
                let (rank, message) = report.split_once(' ')?;
                Some(Error::Rank { rank: rank.parse().ok()?, message: message.to_owned() })
            }
            Err(why) => {
                let message = format!("it is gone, and with it the rendezvous store: {why}");
                Some(Error::Rank { rank: 0, message })
            }
        }
    }

    /// The error of a call that failed: the first failure that any rank reported, or else `message`.
    fn first_failure(&self, message: String) -> Error {
        let started = Instant::now();
        while started.elapsed() < FAILURE_WAIT {
            if let Some(error) = self.failure(self.store) {
                return error;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Error::Rank { rank: self.launch.rank, message }
    }

    /// Writes this rank's heartbeat and watches that of the next rank, until `done`. So every rank is watched, and of several
    /// ranks that are gone, at least one is watched by a rank that is alive. Ends this process if it still runs
    /// [`EXIT_GRACE`] after another rank's failure.
    fn monitor(&self, done: &AtomicBool) {
        let (rank, next) = (self.launch.rank, (self.launch.rank + 1) % self.launch.world_size);
        let mut last_beat: Option<(String, Instant)> = None;
        let mut failure: Option<(Error, Instant)> = None;
        for beat in 0u64.. {
            if done.load(Ordering::Relaxed) {
                return;
            }
            self.set(self.monitor_store, &self.heartbeat_key(rank), &beat.to_string());
            // A rank that has not started yet is waited for where it is needed.
            if let Ok(Some(beat)) = self.get(self.monitor_store, &self.heartbeat_key(next)) {
                match &last_beat {
                    Some((last, since)) if *last == beat => {
                        if since.elapsed() > HEARTBEAT_TIMEOUT {
                            let seconds = HEARTBEAT_TIMEOUT.as_secs();
                            self.report_failure(
                                self.monitor_store,
                                next,
                                &format!("it is gone: no heartbeat for {seconds} s"),
                            );
                        }
                    }
                    _ => last_beat = Some((beat, Instant::now())),
                }
            }
            match &failure {
                None => failure = self.failure(self.monitor_store).map(|error| (error, Instant::now())),
                Some((error, since)) if since.elapsed() > EXIT_GRACE => {
                    let doing = self.doing.lock().map_or("?", |doing| *doing);
                    tracing::error!(
                        "training failed: {error}; rank {rank} still waits in {doing}, and is ended"
                    );
                    std::process::exit(EXIT_CODE);
                }
                Some(_) => {}
            }
            std::thread::sleep(HEARTBEAT_INTERVAL);
        }
    }

    /// Runs `work` as this rank, then waits for the other ranks.
    ///
    /// # Errors
    /// Every rank returns the error of the rank that failed first.
    pub fn run<T>(
        &self,
        sequence_ranks: usize,
        work: impl FnOnce(&dyn Comm, &dyn Comm) -> Result<T>,
    ) -> Result<T> {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| self.monitor(&done));
            let result = catch_panic(self.launch.rank, || {
                let world = self.group("world", 0, self.launch.world_size)?;
                let first = self.launch.rank / sequence_ranks * sequence_ranks;
                let sequence = self.group("sequence", first, sequence_ranks)?;
                let value = work(&world, &sequence)?;
                world.barrier()?;
                Ok(value)
            });
            if let Err(error) = &result {
                // Report only this rank's own failure. A stop is no failure; all ranks reach the same one.
                let of_another = matches!(error, Error::Rank { rank, .. } if *rank != self.launch.rank);
                if !of_another && !matches!(error, Error::Stopped(_)) {
                    self.report_failure(self.store, self.launch.rank, &error.to_string());
                }
                if !matches!(error, Error::Stopped(_)) && self.launch.rank == 0 && !self.launch.agent_store {
                    // This process serves the store, from which the others still have to read the failure.
                    std::thread::sleep(FAILURE_WAIT);
                }
            }
            done.store(true, Ordering::Relaxed);
            result
        })
    }
}

impl Drop for ProcessGroups {
    fn drop(&mut self) {
        // Safety: nothing else has the pointer
        unsafe {
            ffi::lw_store_close(self.monitor_store);
            ffi::lw_store_close(self.store);
        };
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        if let Ok(group) = self.group.lock() {
            // Safety: nothing else has the pointer
            unsafe { ffi::lw_group_close(*group) };
        }
    }
}

fn to_torch(tensor: Tensor<1>) -> Torch {
    let primitive = tensor.try_into_primitive::<LibTorch>();
    primitive.expect("process groups are used with LibTorch's devices").tensor.contiguous()
}

fn from_torch(tensor: Torch) -> Tensor<1> {
    Tensor::from_primitive::<LibTorch>(TchTensor::new(tensor))
}

/// The same memory as bytes. The backend need not know the type of data that is only moved.
fn bytes(tensor: &Torch) -> Torch {
    tensor.view_dtype(Kind::Uint8)
}

fn pointer(tensor: &Torch) -> TorchPointer {
    tensor.as_ptr().cast_mut().cast()
}

impl Group<'_> {
    /// Turns the status code of a call into a result.
    fn check(&self, code: c_int) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(self.processes.first_failure(last_error())) }
    }

    fn call<T>(&self, doing: &'static str, call: impl FnOnce(*mut ffi::Group) -> T) -> T {
        if let Ok(mut last) = self.processes.doing.lock() {
            *last = doing;
        }
        call(*self.group.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

impl Comm for Group<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, to: usize, from: usize, tensors: Vec<Tensor<1>>) -> Result<Pending<'_>> {
        let sent: Vec<Torch> = tensors.into_iter().map(to_torch).collect();
        let received: Vec<Torch> = sent.iter().map(Torch::empty_like).collect();
        let (sent_bytes, received_bytes): (Vec<Torch>, Vec<Torch>) =
            (sent.iter().map(bytes).collect(), received.iter().map(bytes).collect());
        let mut input: Vec<TorchPointer> = sent_bytes.iter().map(pointer).collect();
        let mut out: Vec<TorchPointer> = received_bytes.iter().map(pointer).collect();
        let n = input.len() as c_int;
        let (tag_to, tag_from) = (self.sent[to].get(), self.received[from].get());
        self.sent[to].set(tag_to + n);
        self.received[from].set(tag_from + n);
        let mut pending = null_mut();
        // Safety: the tensors live until the call returns, and then the pending work has them
        let code = self.call("exchange", |group| unsafe {
            ffi::lw_exchange(
                group,
                to as c_int,
                from as c_int,
                tag_to,
                tag_from,
                n,
                input.as_mut_ptr(),
                out.as_mut_ptr(),
                &mut pending,
            )
        });
        self.check(code)?;
        Ok(Box::new(move || {
            // Safety: the work is waited for once
            self.check(unsafe { ffi::lw_wait(pending) })?;
            Ok(received.into_iter().map(from_torch).collect())
        }))
    }

    fn all_gather(&self, tensor: Tensor<1>) -> Result<Tensor<1>> {
        let own = to_torch(tensor);
        let all = Torch::empty([own.size()[0] * self.size as i64], (own.kind(), own.device()));
        let (input, out) = (bytes(&own), bytes(&all));
        // Safety: both live until the call returns
        let code = self
            .call("all-gather", |group| unsafe { ffi::lw_all_gather(group, pointer(&input), pointer(&out)) });
        self.check(code)?;
        Ok(from_torch(all))
    }

    fn reduce_scatter(&self, tensor: Tensor<1>) -> Result<Tensor<1>> {
        let all = to_torch(tensor);
        let own = Torch::empty([all.size()[0] / self.size as i64], (all.kind(), all.device()));
        // Safety: both live until the call returns
        let code = self.call("reduce-scatter", |group| unsafe {
            ffi::lw_reduce_scatter(group, pointer(&all), pointer(&own))
        });
        self.check(code)?;
        Ok(from_torch(own))
    }

    fn all_reduce(&self, tensor: Tensor<1>) -> Result<Tensor<1>> {
        // The call works in place, and others may hold the tensor.
        let sum = to_torch(tensor).copy();
        // Safety: it lives until the call returns
        let code = self.call("all-reduce", |group| unsafe { ffi::lw_all_reduce(group, pointer(&sum)) });
        self.check(code)?;
        Ok(from_torch(sum))
    }

    fn barrier(&self) -> Result<()> {
        // Safety: the group lives as long as `self`
        let code = self.call("barrier", |group| unsafe { ffi::lw_barrier(group) });
        self.check(code)
    }
}

#[cfg(all(test, gloo))]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::dataset::tests::packed;
    use crate::{Location, TrainJob};
    use object_store::local::LocalFileSystem;
    use serde_json::json;

    /// The variable that tells a process of these tests what to do.
    const WORK: &str = "LENGTHWISE_TEST_WORK";

    /// Starts `size` processes that run the test `a_rank`, each with its own task.
    fn start(size: usize, work: impl Fn(usize) -> String) -> Vec<Child> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let rank = |rank: usize| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "comm::c10d::tests::a_rank", "--nocapture"])
                .env(WORK, work(rank))
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .env("WORLD_SIZE", size.to_string())
                .env("RANK", rank.to_string())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        };
        (0..size).map(rank).collect()
    }

    /// What a process printed after "said: ".
    fn said(child: Child) -> String {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find_map(|line| line.split_once("said: ").map(|(_, rest)| rest.to_owned()));
        line.unwrap_or_else(|| panic!("{text}\n{errors}"))
    }

    /// Does nothing unless another test started this process.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_rank() {
        let Ok(work) = std::env::var(WORK) else { return };
        if let Some(folder) = work.strip_prefix("train ") {
            let trained = train(folder, None).await;
            match trained {
                Ok(losses) => println!("said: {}", json!(losses)),
                Err(error) => println!("said: {error}"),
            }
            return;
        }
        let launch = LaunchEnv::from_env().unwrap().unwrap();
        let (rank, size) = (launch.rank, launch.world_size);
        let processes =
            ProcessGroups::open(launch, DeviceName::LibtorchCpu, Duration::from_secs(30)).unwrap();
        let result = processes.run(size, |world, _| {
            let device = DeviceName::LibtorchCpu.open().unwrap();
            let tensor = |values: Vec<f32>| Tensor::<1>::from_floats(values.as_slice(), &device);
            let numbers = |tensor: Tensor<1>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
            if work == "fail" && rank == 1 {
                return Err(Error::Conf("rank one fails".into()));
            }
            if work == "sleep" && rank == 1 {
                println!("asleep");
                std::thread::sleep(Duration::from_secs(60));
            }
            let gathered = numbers(world.all_gather(tensor(vec![rank as f32, 0.5]))?);
            let whole = (0..2 * size).map(|i| (i * (rank + 1)) as f32).collect();
            let part = numbers(world.reduce_scatter(tensor(whole))?);
            let sum = numbers(world.all_reduce(tensor(vec![rank as f32, 1.0]))?);
            let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
            // Two exchanges are in progress at once.
            let first = world.exchange(to, from, vec![tensor(vec![rank as f32]), tensor(vec![7.0, 8.0])])?;
            let second = world.exchange(to, from, vec![tensor(vec![10.0 + rank as f32])])?;
            let received: Vec<Vec<f32>> = first()?.into_iter().chain(second()?).map(numbers).collect();
            Ok(json!([gathered, part, sum, received]))
        });
        match result {
            Ok(value) => println!("said: {value}"),
            Err(error) => println!("said: {error}"),
        }
    }

    /// The losses of a small training in a folder.
    async fn train(folder: &str, ranks: Option<usize>) -> Result<Vec<f64>> {
        let store = Arc::new(LocalFileSystem::new_with_prefix(folder).unwrap());
        let at =
            |name: &str| Location { store: store.clone(), path: name.into(), base: format!("{folder}/") };
        let out = format!("out-{}", ranks.unwrap_or_default());
        let conf = json!({
            "shape": { "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 4, "kv_heads": 2 },
            "steps": 6, "learning_rate": 1e-2, "devices": ["libtorch-cpu"], "ranks": ranks,
        });
        let job = TrainJob {
            conf: serde_json::from_value(conf).unwrap(),
            dataset: at("data"),
            dataset_digest: "d".into(),
            checkpoint: None,
            output: at(&out).join("model"),
            checkpoints: at(&out).join("checkpoints"),
            logs: at(&out).join("logs"),
            vocab_size: 11,
            sequence_tokens: 53,
            bos: None,
            eos: None,
            tokenizer: None,
        };
        let mut losses = vec![];
        let mut on_step = |step: &crate::StepMetrics| losses.push(step.loss);
        crate::train(&job, &Arc::new(AtomicBool::new(false)), &mut on_step).await?;
        Ok(losses)
    }

    #[test]
    fn processes_get_what_the_others_have() {
        let size = 3;
        let children = start(size, |_| "collectives".into());
        for (rank, child) in children.into_iter().enumerate() {
            let before = (rank + 2) % 3;
            let want = json!([
                [0.0, 0.5, 1.0, 0.5, 2.0, 0.5],
                [12.0 * rank as f32, 6.0 * (2 * rank + 1) as f32],
                [3.0, 3.0],
                [[before as f32], [7.0, 8.0], [10.0 + before as f32]],
            ]);
            assert_eq!(said(child), want.to_string());
        }
    }

    #[test]
    fn a_process_that_fails_ends_the_others_with_its_error() {
        let started = Instant::now();
        for (rank, child) in start(3, |_| "fail".into()).into_iter().enumerate() {
            let said = said(child);
            assert!(said.contains("rank one fails"), "{rank}: {said}");
        }
        assert!(started.elapsed() < Duration::from_secs(25));
    }

    #[test]
    fn a_killed_process_ends_the_others_within_a_minute_with_its_name() {
        let started = Instant::now();
        // Of five ranks, two are connected to rank 1 only through others.
        let mut children = start(5, |_| "sleep".into());
        std::thread::sleep(Duration::from_secs(2));
        let mut killed = children.remove(1);
        killed.kill().unwrap();
        killed.wait().unwrap();
        for child in children {
            let said = said(child);
            assert!(said.contains("rank 1: it is gone"), "{said}");
        }
        assert!(started.elapsed() < Duration::from_secs(60));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn processes_train_as_threads_do() {
        let folder = tempfile::tempdir().unwrap();
        let row = |seed: i32| {
            let ids: Vec<i32> = (0..53).map(|i| (i * seed + i * i % 3) % 11).collect();
            (ids, 1, vec![("a", 0, 20), ("b", 20, 53)])
        };
        std::fs::create_dir(folder.path().join("data")).unwrap();
        let bytes = packed(&(3..7).map(row).collect::<Vec<_>>());
        std::fs::write(folder.path().join("data/train-00000-of-00001.parquet"), bytes).unwrap();
        let path = folder.path().to_str().unwrap();
        for size in [2, 4] {
            let want = train(path, Some(size)).await.unwrap();
            let children = start(size, |_| format!("train {path}"));
            let mut said = children.into_iter().map(said);
            let losses: Vec<f64> = serde_json::from_str(&said.next().unwrap()).unwrap();
            assert!(said.all(|said| said == "[]"), "only the first rank says its steps");
            assert_eq!(losses.len(), 6);
            for (a, b) in losses.iter().zip(&want) {
                assert!((a - b).abs() < 2e-5 * b, "{size}: {losses:?} {want:?}");
            }
            std::fs::remove_dir_all(folder.path().join("out-0")).unwrap();
        }
    }
}
