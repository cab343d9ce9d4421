//! The log, on stderr.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing_subscriber::filter::{EnvFilter, FilterExt, LevelFilter, dynamic_filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// What is said unless `LENGTHWISE_LOG` says otherwise: of libraries, what warns, that storage is asked again, and that the
/// scheduler has lost an executor.
const SAID: &str = concat!(
    "warn,lengthwise=info,lengthwise_model=info,object_store::client::retry=info,",
    "ballista_scheduler::state::executor_manager=info"
);

/// Where the library of storage says that a request failed and is tried again. Hundreds may, each some times: one is said …
const RETRY: &str = "object_store::client::retry";
/// … this often.
const EVERY: Duration = Duration::from_secs(10);

/// Starts it, as text for people or as JSON.
pub fn start(json: bool) {
    let (filter, asked) = match EnvFilter::try_from_env("LENGTHWISE_LOG") {
        Ok(filter) => (filter, true),
        Err(_) => (EnvFilter::new(SAID), false),
    };
    let said: Mutex<Option<Instant>> = Mutex::default();
    let now_and_then = dynamic_filter_fn(move |event, _| {
        if asked || event.target() != RETRY {
            return true;
        }
        let mut said = said.lock().expect("no panic while held");
        let again = said.is_none_or(|at| at.elapsed() >= EVERY);
        if again {
            *said = Some(Instant::now());
        }
        again
    });
    // or else libraries would make up what nobody hears
    let now_and_then =
        now_and_then.with_max_level_hint(filter.max_level_hint().unwrap_or(LevelFilter::TRACE));
    let log = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        // whoever reads the log may go away: that costs nothing
        .log_internal_errors(false);
    let log = if json { log.json().flatten_event(true).boxed() } else { log.compact().boxed() };
    tracing_subscriber::registry().with(log.with_filter(filter.and(now_and_then))).init();
}
