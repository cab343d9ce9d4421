//! The log, on stderr.

use tracing_subscriber::filter::{EnvFilter, FilterExt, LevelFilter, dynamic_filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::progress::{EVERY, Rarely};

/// What is said unless `LENGTHWISE_LOG` says otherwise: of libraries, what warns, that storage is asked again, and that the
/// scheduler has lost an executor.
const SAID: &str = concat!(
    "warn,lengthwise=info,lengthwise_model=info,object_store::client::retry=info,",
    "ballista_scheduler::state::executor_manager=info"
);

/// Where the library of storage says that a request failed and is tried again. Hundreds may, each some times: one is said now
/// and then.
const RETRY: &str = "object_store::client::retry";

/// Starts it, as text for people or as JSON.
pub fn start(json: bool) {
    let (filter, asked) = match EnvFilter::try_from_env("LENGTHWISE_LOG") {
        Ok(filter) => (filter, true),
        Err(_) => (EnvFilter::new(SAID), false),
    };
    let retries = Rarely::new(EVERY);
    let now_and_then =
        dynamic_filter_fn(move |event, _| asked || event.target() != RETRY || retries.is_time());
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
