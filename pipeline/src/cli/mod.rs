//! The command line: arguments, signals, exit codes. One file a subcommand; results go to stdout, the rest to stderr.

#[cfg(feature = "cluster")]
mod cluster;
mod compare;
#[cfg(feature = "train")]
mod eval;
mod gc;
#[cfg(feature = "train")]
mod generate;
mod init;
mod log;
mod plan;
mod preview;
#[cfg(all(test, feature = "train"))]
mod reference;
mod report;
mod reproduce;
mod run;
mod sql;
mod sweep;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, CommandFactory, Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Mutex, OnceCell};

use crate::conf::Conf;
use crate::error::{Doing, EXIT_CODES};
use crate::run::{Goal, Run};
use crate::sql::{Files, git};
use crate::storage::Stores;
use crate::{Error, Result};

/// Make a language model's context long by engineering its data: exact document lengths, SQL mixture recipes,
/// packed sequences, and the training run that they feed.
#[derive(Parser)]
#[command(name = "lengthwise", version, max_term_width = 110, after_help = after_help())]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

fn after_help() -> String {
    let codes = EXIT_CODES.map(|(code, meaning)| format!("  {code:<3} {meaning}\n"));
    format!(
        "Exit codes:\n{}\nExamples:
  lengthwise init mixture
  lengthwise run conf/quickstart.toml
  lengthwise preview conf/corpus.toml --set mixture.recipe=sql/mixtures/global.sql
  lengthwise sql conf/corpus.toml \"select domain, tokens from domains\"",
        codes.concat()
    )
}

#[derive(Subcommand)]
enum Command {
    /// Write a first project: a conf that runs at once, the recipes, a check
    Init(init::InitArguments),
    /// Do all that a conf asks for; the last line of stdout is the run's directory
    Run(run::RunArguments),
    /// The same for a conf with a [train] table, under the name that a scheduler of training jobs knows
    #[cfg(feature = "train")]
    Train(run::TrainArguments),
    /// Ask what a model makes of long texts: needle, loss, retrieval, bookqa, choices
    #[cfg(feature = "train")]
    Eval(Box<eval::EvalArguments>),
    /// Print the continuation of a text by a checkpoint
    #[cfg(feature = "train")]
    Generate(generate::GenerateArguments),
    /// Run a conf with several recipes, trained and evaluated alike, and compare them
    Sweep(sweep::SweepArguments),
    /// Say what differs between runs, in what was asked and in what came of it
    Compare(compare::CompareArguments),
    /// Say for every stage whether it is there already, and if not, why
    Plan(plan::PlanArguments),
    /// Show the mixture that a recipe gives, before anything is drawn
    Preview(preview::PreviewArguments),
    #[command(about = sql::about())]
    Sql(sql::SqlArguments),
    /// Write a run's report again, to stdout or into a file
    Report(report::ReportArguments),
    /// Recompute every digest and every sum of a run; what is broken is withdrawn, so that `run` computes it again
    Verify(verify::VerifyArguments),
    /// Remove what dead runs left behind; never what a manifest names
    Gc(gc::GcArguments),
    /// Check a run's inputs and versions, run it again into another place, and compare digests
    Reproduce(reproduce::ReproduceArguments),
    /// Be a part of a cluster that does the heavy tasks of runs
    #[cfg(feature = "cluster")]
    Cluster(cluster::ClusterArguments),
    /// Print completions for a shell
    Completions { shell: clap_complete::Shell },
}

/// Which conf, and how it is changed for this once.
#[derive(Args, Clone)]
struct ConfArguments {
    /// The conf's TOML file
    conf: String,
    /// Set a key of the conf, as in `--set mixture.budget=10M` or `--set source.0.url=s3://bucket/shards/`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Read conf and SQL from this git commit; relative paths are from its root
    #[arg(long, value_name = "COMMIT")]
    at: Option<String>,
}

impl ConfArguments {
    fn open(&self, goal: Goal) -> Result<Run> {
        let files = match &self.at {
            None => Files { root: PathBuf::from("."), ..Files::default() },
            Some(commit) => {
                let top = git(".".as_ref(), &["rev-parse", "--show-toplevel"])?;
                if !top.status.success() {
                    return Err(Error::usage(
                        "--at needs a git repository around this folder",
                        "run it inside one",
                    ));
                }
                let root = PathBuf::from(String::from_utf8_lossy(&top.stdout).trim());
                let found = git(&root, &["rev-parse", "--verify", &format!("{commit}^{{commit}}")])?;
                if !found.status.success() {
                    return Err(Error::usage(
                        format!("there is no commit `{commit}`"),
                        "`git log` lists them",
                    ));
                }
                let commit = String::from_utf8_lossy(&found.stdout).trim().to_owned();
                Files { root, commit: Some(commit), ..Files::default() }
            }
        };
        let text = files.read(&self.conf)?;
        let conf = Conf::parse(&text, &self.conf, &self.sets, &|name| std::env::var(name).ok())?;
        Run::new(conf, &self.conf, files, goal)
    }
}

/// The program.
pub fn main() -> ExitCode {
    let parsed = Arguments::try_parse();
    let json = std::env::var("LENGTHWISE_LOG_FORMAT").is_ok_and(|format| format == "json");
    log::start(json);
    let done = match parsed {
        Ok(arguments) => start(arguments.command),
        Err(error) if error.use_stderr() => error.exit(),
        // help, and the version
        Err(asked) => help(&asked),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            if json {
                let help = miette::Diagnostic::help(&error).map(|help| help.to_string());
                let place = error.place();
                tracing::error!(code, place, help, causes = ?error.causes(), "{error}");
                return ExitCode::from(code);
            }
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "{:?}", error.shown());
            ExitCode::from(code)
        }
    }
}

/// Prints what clap has to say where nothing is wrong, in colours for a person.
fn help(asked: &clap::Error) -> Result<()> {
    let text = asked.render();
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
    out(if is_terminal { text.ansi().to_string() } else { text.to_string() }).map(drop)
}

/// Has the allocator keep what is freed up to a point, for the next part: fetched anew, page by page, it takes a twentieth of
/// the time of tokenising.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // Safety: sets numbers of the allocator's
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
    }
}

fn start(command: Command) -> Result<()> {
    keep_memory();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Io { doing: "cannot start threads".into(), source })?;
    let result = runtime.block_on(async {
        match command {
            Command::Init(arguments) => init::main(arguments).await,
            Command::Run(arguments) => run::main(arguments).await,
            #[cfg(feature = "train")]
            Command::Train(arguments) => run::train(arguments).await,
            #[cfg(feature = "train")]
            Command::Eval(arguments) => eval::main(*arguments).await,
            #[cfg(feature = "train")]
            Command::Generate(arguments) => generate::main(arguments).await,
            Command::Sweep(arguments) => sweep::main(arguments).await,
            Command::Compare(arguments) => compare::main(arguments).await,
            Command::Plan(arguments) => plan::main(arguments).await,
            Command::Preview(arguments) => preview::main(arguments).await,
            Command::Sql(arguments) => sql::main(arguments).await,
            Command::Report(arguments) => report::main(arguments).await,
            Command::Verify(arguments) => verify::main(arguments).await,
            Command::Gc(arguments) => gc::main(arguments).await,
            Command::Reproduce(arguments) => reproduce::main(arguments).await,
            #[cfg(feature = "cluster")]
            Command::Cluster(arguments) => cluster::main(arguments).await,
            Command::Completions { shell } => {
                let mut script = vec![];
                clap_complete::generate(shell, &mut Arguments::command(), "lengthwise", &mut script);
                out(script).map(drop)
            }
        }
    });
    // work on other threads has seen the stop, or is of no use any more
    runtime.shutdown_background();
    result
}

/// The signals that say to stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// How many there were.
    told: usize,
}

/// What has been heard since work first listened: a signal is for all that this process does, also where it comes
/// between one piece of work and the next.
static SIGNALS: OnceCell<Mutex<Signals>> = OnceCell::const_new();

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).doing(|| "cannot listen for signals".into());
        let (terminate, interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt, told: 0 })
    }

    /// Returns when the next one comes.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        self.told += 1;
    }
}

/// Runs `work` until it ends or a signal says to stop. Training is given the time to finish its step and to write a
/// checkpoint; a second signal ends it, too.
async fn until_stopped<T>(run: &Run, work: impl Future<Output = Result<T>>) -> Result<T> {
    until_told(&run.stop, &run.training, work).await
}

/// The same, where `finishes` says whether what is under way is given time.
async fn until_told<T>(
    stop: &AtomicBool,
    finishes: &AtomicBool,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let mut signals = SIGNALS.get_or_try_init(async || Signals::listen().map(Mutex::new)).await?.lock().await;
    let mut work = std::pin::pin!(work);
    loop {
        match signals.told {
            0 => {}
            1 if finishes.load(Ordering::Relaxed) => {
                tracing::info!("stopping after this step, with a checkpoint; once more to stop now");
            }
            _ => return Err(Error::Stopped),
        }
        tokio::select! {
            done = &mut work => return done,
            () = signals.next() => stop.store(true, Ordering::Relaxed),
        }
    }
}

/// Prints a value for a machine, or a text for a person.
fn print(json: bool, value: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<()> {
    let text = if json { serde_json::to_string_pretty(value).expect("plain values print") } else { text() };
    out(format!("{}\n", text.trim_end_matches('\n'))).map(drop)
}

/// Writes to stdout; nothing else does. Says whether anybody reads on: that a reader goes away (`| head`) is no failure.
fn out(bytes: impl AsRef<[u8]>) -> Result<bool> {
    use std::io::{ErrorKind, Write};
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes.as_ref()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(source) => Err(Error::Io { doing: "cannot write to stdout".into(), source }),
    }
}

/// Writes a file that the command line names.
fn write(path: &std::path::Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(path, bytes).doing(|| format!("cannot write {}", path.display()))
}

/// The directory of a run, by URL or path.
fn run_folder(url: &str) -> Result<crate::storage::Location> {
    if url.ends_with(".toml") {
        let help = "`lengthwise run CONF` prints the directory as its last line";
        return Err(Error::usage(format!("{url} is a conf, and the directory of a run is wanted"), help));
    }
    stores()?.open(url)
}

/// Stores whose relative paths start where the command runs.
fn stores() -> Result<Stores> {
    std::env::current_dir().doing(|| "cannot tell the current folder".into()).map(Stores::new)
}
