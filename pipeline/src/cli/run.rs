//! `lengthwise run`

#[cfg(feature = "train")]
use std::{
    os::unix::process::CommandExt,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use clap::Args;
#[cfg(feature = "train")]
use lengthwise_model::comm::LaunchEnv;
use serde_json::json;

use super::{ConfArguments, print, until_stopped};
use crate::dataflow::{Flow, checked, mended, remember};
use crate::run::{Goal, Run};
use crate::stage::{STAGES, Stage};
use crate::watch::{Watch, refused, summary};
use crate::{Error, Result};

#[derive(Args)]
pub struct RunArguments {
    #[command(flatten)]
    conf: ConfArguments,
    /// Stop after this stage
    #[arg(long, value_name = "STAGE")]
    until: Option<Stage>,
    /// Compute this stage and all after it again, and compare with what is there
    #[arg(long, value_name = "STAGE")]
    from: Option<Stage>,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: RunArguments) -> Result<()> {
    if let (Some(from), Some(until)) = (arguments.from, arguments.until)
        && from > until
    {
        let message =
            format!("--from {} comes after --until {}: nothing would be computed", from.name(), until.name());
        let stages = STAGES.map(|about| about.name).join(", ");
        return Err(Error::usage(message, format!("stages are, in order: {stages}")));
    }
    #[cfg(feature = "train")]
    if arguments.from.is_some() && LaunchEnv::from_env()?.is_some() {
        let help = "compute again with one process, `--until pack`; then train with all of them";
        return Err(Error::usage("--from is for one process, and this is one of several", help));
    }
    #[cfg(feature = "train")]
    if crate::stages::train::follows()? {
        let run = arguments.conf.open(Goal::Look)?;
        return until_stopped(&run, follow(&run, arguments.until)).await;
    }
    let run = open(&arguments.conf, Goal::Compute { from: arguments.from })?;
    let folder = go(&run, arguments.until).await?;
    let steps = run.steps.lock().expect("no panic while held").clone();
    if arguments.json || folder.is_some() {
        print(arguments.json, &json!({ "run": folder, "stages": steps }), || {
            folder.clone().unwrap_or_default()
        })?;
    }
    Ok(())
}

/// Opens a conf; monitoring hears of one that is wrong.
fn open(conf: &ConfArguments, goal: Goal) -> Result<Run> {
    conf.open(goal).inspect_err(|error| refused(&conf.conf, error))
}

/// `lengthwise train`
#[cfg(feature = "train")]
#[derive(Args)]
pub struct TrainArguments {
    #[command(flatten)]
    run: RunArguments,
    /// Start so many processes here, a rank each; elsewhere torchrun, Slurm or Kubernetes start them
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    nproc: Option<u16>,
}

#[cfg(feature = "train")]
pub async fn train(arguments: TrainArguments) -> Result<()> {
    let run = open(&arguments.run.conf, Goal::Look)?;
    if run.conf.train.is_none() {
        return Err(Error::usage("the conf has no [train] table", "add one, or use `lengthwise run`"));
    }
    match arguments.nproc {
        // what it starts is this same command, which then knows its place
        Some(size) if LaunchEnv::from_env()?.is_none() => processes(&run, usize::from(size)).await,
        _ => main(arguments.run).await,
    }
}

/// After one rank has failed, the others have so long to find out and to end.
#[cfg(feature = "train")]
const GRACE: Duration = Duration::from_secs(45);

/// Starts this command again as so many ranks, and ends as the first of them that fails, or as the first rank.
#[cfg(feature = "train")]
async fn processes(run: &Run, size: usize) -> Result<()> {
    let io = |doing: &str| {
        let doing = doing.to_owned();
        move |source| Error::Io { doing, source }
    };
    let program = std::env::current_exe().map_err(io("cannot find this program"))?;
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = port.map_err(io("cannot find a free port"))?.port().to_string();
    let mut children = vec![];
    for rank in 0..size {
        let mut command = std::process::Command::new(&program);
        command.args(std::env::args_os().skip(1));
        for (name, value) in [
            ("MASTER_ADDR", "127.0.0.1".to_owned()),
            ("MASTER_PORT", port.clone()),
            ("WORLD_SIZE", size.to_string()),
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
        ] {
            command.env(name, value);
        }
        // a signal from the terminal comes to this process, which passes it on once; and none outlives it
        command.process_group(0);
        #[cfg(target_os = "linux")]
        // Safety: only makes a system call between fork and exec
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        children.push(Some(command.spawn().map_err(io("cannot start a rank"))?));
    }
    let all = async {
        let (mut first_failure, mut told, mut failed) = (0, false, None::<Instant>);
        while children.iter().any(Option::is_some) {
            let stop = run.stop.load(Ordering::Relaxed);
            for (rank, place) in children.iter_mut().enumerate() {
                let Some(child) = place else { continue };
                if stop && !told {
                    // a signal to this process alone is one to the ranks, too
                    let _ = std::process::Command::new("kill").arg(child.id().to_string()).status();
                }
                if failed.is_some_and(|since| since.elapsed() > GRACE) {
                    tracing::warn!("rank {rank} did not end, and is killed");
                    // it may just have ended
                    let _ = child.kill();
                }
                let Some(status) = child.try_wait().map_err(io("cannot wait for a rank"))? else { continue };
                // a rank that was killed has no code; the training failed
                let code = status.code().unwrap_or(6);
                if !status.success() {
                    tracing::warn!("rank {rank} ended with {status}");
                    first_failure = if first_failure == 0 { code } else { first_failure };
                    failed.get_or_insert_with(Instant::now);
                }
                *place = None;
            }
            told = stop;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(first_failure)
    };
    run.training.store(true, Ordering::Relaxed);
    match until_stopped(run, all).await? {
        0 => Ok(()),
        75 => Err(Error::Stopped),
        code => std::process::exit(code),
    }
}

/// As a rank that is not the first: waits for what the first one packs, and trains along.
#[cfg(feature = "train")]
async fn follow(run: &Run, until: Option<Stage>) -> Result<()> {
    loop {
        match Flow::default().go(run, until).await {
            Err(Error::Absent { .. }) => tokio::time::sleep(Duration::from_secs(1)).await,
            gone => return gone,
        }
    }
}

/// Runs to the end or to `until`; the run's directory, where it came to one.
pub async fn go(run: &Run, until: Option<Stage>) -> Result<Option<String>> {
    watched(run, through(run, until)).await
}

/// What a sweep does of each run before the first trains: its mixture, after what is wrong in the rest was looked for.
pub async fn go_ahead(run: &Run) -> Result<()> {
    let work = async {
        checked(run, None).await?;
        through(run, Some(Stage::Mixture)).await
    };
    watched(run, work).await.map(|_| ())
}

/// Does a run's work until a signal says to stop, and tells those who watch it.
async fn watched(run: &Run, work: impl Future<Output = Result<Option<String>>>) -> Result<Option<String>> {
    let folder = Watch::new()?.during(run, until_stopped(run, work)).await?;
    tracing::info!("{}", summary(run, folder.as_deref()));
    Ok(folder)
}

async fn through(run: &Run, until: Option<Stage>) -> Result<Option<String>> {
    mended(run, async || publish(run, until).await).await
}

/// Goes through the stages, and publishes what came of them where they came to packed sequences.
async fn publish(run: &Run, until: Option<Stage>) -> Result<Option<String>> {
    let mut flow = Flow::default();
    let gone = flow.go(run, until).await;
    let remembered = remember(run).await;
    gone?;
    remembered?;
    for step in run.steps.lock().expect("no panic while held").iter() {
        let how = if step.cached { "was there".to_owned() } else { format!("took {:.1} s", step.seconds) };
        tracing::info!("{}: {how}", step.stage);
    }
    let Some(dataset) = flow.dataset() else { return Ok(None) };
    run.check_stop()?;
    Ok(Some(dataset.publish(run).await?.url()))
}
