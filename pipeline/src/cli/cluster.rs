//! `lengthwise cluster`

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Args, Subcommand};

use super::{Signals, stores};
use crate::conf::{MIN_MEMORY, Size};
use crate::executor::ballista::{Address, execute, schedule};
use crate::run::machine_memory;
use crate::sql::engine::Engine;
use crate::{Error, Result};

/// An executor that is told to stop has so long for its tasks to end; Kubernetes kills it after 30 seconds.
const GRACE: Duration = Duration::from_secs(20);

#[derive(Args)]
#[command(after_help = "Examples:
  lengthwise cluster scheduler --port 50050
  lengthwise cluster executor --scheduler localhost:50050 --port 50061
  lengthwise run conf/x.toml --set engine.url=df://localhost:50050

There is no password: whoever reaches the scheduler or an executor can have it read and write what its credentials allow.
Let nobody but the cluster's own machines reach their ports.")]
pub struct ClusterArguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Gives the tasks of runs to executors
    Scheduler {
        #[command(flatten)]
        place: PlaceArguments,
    },
    /// Does tasks: reads sources, writes documents, ids and packed sequences
    Executor {
        #[command(flatten)]
        place: PlaceArguments,
        /// The scheduler, HOST:PORT
        #[arg(long, value_name = "HOST:PORT", default_value = "localhost:50050")]
        scheduler: String,
        /// How many tasks it does at a time; as many as the machine has cores by default
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
        slots: Option<u16>,
        /// For the queries of all of its tasks together; what doesn't fit spills to disk
        #[arg(long, value_name = "SIZE", default_value = "2GB")]
        memory: Size,
        /// A folder with room for what spills, and for source files; the system's temporary folder by default
        #[arg(long, value_name = "FOLDER")]
        spill: Option<String>,
    },
}

#[derive(Args)]
struct PlaceArguments {
    /// The name by which the others reach it; without one, only this machine can
    #[arg(long, default_value = "localhost")]
    host: String,
    /// 50050 of a scheduler, 50061 of an executor by default; an executor takes the next one, too
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=65534))]
    port: Option<u16>,
}

impl PlaceArguments {
    fn or(self, port: u16) -> Address {
        Address { host: self.host, port: self.port.unwrap_or(port) }
    }
}

pub async fn main(arguments: ClusterArguments) -> Result<()> {
    let mut told = Signals::listen()?;
    match arguments.role {
        Role::Scheduler { place } => {
            tokio::select! {
                ended = schedule(place.or(50050)) => ended,
                () = told.next() => Ok(()),
            }
        }
        Role::Executor { place, scheduler, slots, memory, spill } => {
            let wrong = || {
                let message = format!("--scheduler {scheduler} is not HOST:PORT");
                Error::usage(message, "write --scheduler localhost:50050")
            };
            let (host, port) = scheduler.rsplit_once(':').ok_or_else(wrong)?;
            let port = port.parse().map_err(|_| wrong())?;
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
            let slots = slots.map_or(cores, usize::from);
            if memory.0 < MIN_MEMORY || machine_memory(Path::new("/")).is_some_and(|all| memory.0 > all) {
                let help = "64MB at least, and no more than there is; what doesn't fit spills to disk";
                return Err(Error::usage(format!("--memory {memory} is not what queries can have"), help));
            }
            let engine = Engine::new(slots, memory.0, spill.as_deref())
                .map_err(|e| Error::usage(e.in_a_line(), "name a folder of this machine with --spill"))?;
            let stop: Arc<AtomicBool> = Arc::default();
            let scheduler = Address { host: host.to_owned(), port };
            let work = execute(place.or(50061), scheduler, stores()?, engine, spill.as_deref(), stop.clone());
            tokio::select! {
                ended = work => ended,
                // it ends by itself once its tasks have, unless it still waits for the scheduler
                () = async {
                    told.next().await;
                    stop.store(true, Ordering::Relaxed);
                    tokio::time::sleep(GRACE).await;
                } => Ok(()),
            }
        }
    }
}
