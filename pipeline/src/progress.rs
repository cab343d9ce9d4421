//! Progress of long work on stderr: one bar per stage on a terminal, a log line now and then elsewhere.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use datafusion::execution::SendableRecordBatchStream;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use futures::TryStreamExt;
use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a line is logged if there is no terminal.
pub const EVERY: Duration = Duration::from_secs(10);

/// Limits how often a message is repeated: it is due at first, and then again once `every` has passed.
pub struct Rarely {
    every: Duration,
    last: Mutex<Option<Instant>>,
}

impl Rarely {
    pub fn new(every: Duration) -> Self {
        Self { every, last: Mutex::default() }
    }

    /// Whether the message is due. The caller that gets `true` is the one to log it.
    pub fn is_time(&self) -> bool {
        let mut last = self.last.lock().expect("no panic while held");
        let is_time = last.is_none_or(|at| at.elapsed() >= self.every);
        if is_time {
            *last = Some(Instant::now());
        }
        is_time
    }
}

/// Where bars are drawn.
#[derive(Clone)]
pub struct Progress {
    terminal: bool,
    /// Whether nothing is shown or logged.
    silent: bool,
}

impl Progress {
    /// Shows nothing.
    pub fn none() -> Self {
        Self { terminal: false, silent: true }
    }

    /// Writes to stderr: bars if it is a terminal, otherwise log lines.
    pub fn stderr() -> Self {
        Self { terminal: std::io::IsTerminal::is_terminal(&std::io::stderr()), silent: false }
    }

    /// Starts a stage's bar. `total` is in the unit that `done` counts, or 0 if it is not known.
    pub fn stage(&self, name: &'static str, total: u64) -> Bar {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        if self.terminal {
            let template = if total > 0 {
                "{prefix:>9} {wide_bar} {percent:>3}% {msg} {eta} left"
            } else {
                "{prefix:>9} {spinner} {msg}"
            };
            bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
            bar.set_prefix(name);
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let counts = Counts {
            done: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            rows: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
        };
        let inner = Inner {
            name,
            total,
            terminal: self.terminal,
            silent: self.silent,
            bar,
            counts,
            started: Instant::now(),
            lines: Rarely::new(EVERY),
        };
        Bar(Arc::new(inner))
    }
}

struct Counts {
    done: AtomicU64,
    bytes: AtomicU64,
    rows: AtomicU64,
    tokens: AtomicU64,
}

struct Inner {
    name: &'static str,
    total: u64,
    terminal: bool,
    silent: bool,
    bar: ProgressBar,
    counts: Counts,
    started: Instant,
    lines: Rarely,
}

/// A stage's progress. Clones share their counts.
#[derive(Clone)]
pub struct Bar(Arc<Inner>);

impl Bar {
    /// Adds to the counts: `done` in the bar's unit, and rows, tokens and bytes of text for the message.
    pub fn add(&self, done: u64, rows: u64, tokens: u64, bytes: u64) {
        let counts = &self.0.counts;
        let add = |count: &AtomicU64, n| count.fetch_add(n, Ordering::Relaxed) + n;
        let (done, rows, tokens, bytes) = (
            add(&counts.done, done),
            add(&counts.rows, rows),
            add(&counts.tokens, tokens),
            add(&counts.bytes, bytes),
        );
        let message = self.message(rows, tokens, bytes);
        self.0.bar.set_position(done.min(self.0.total.max(1)));
        self.0.bar.set_message(message.clone());
        if self.0.terminal || self.0.silent {
            return;
        }
        if self.0.started.elapsed() >= EVERY && self.0.lines.is_time() {
            let left = match (done, self.0.total) {
                (1.., total) if total > done => {
                    let left = self.0.started.elapsed().mul_f64((total - done) as f64 / done as f64);
                    format!(", {} left", HumanDuration(left))
                }
                _ => String::new(),
            };
            tracing::info!("{}: {message}{left}", self.0.name);
        }
    }

    /// Passes a query's rows on, and counts them.
    pub fn watch(&self, rows: SendableRecordBatchStream) -> SendableRecordBatchStream {
        let bar = self.clone();
        let schema = rows.schema();
        let counted =
            rows.inspect_ok(move |batch| bar.add(batch.num_rows() as u64, batch.num_rows() as u64, 0, 0));
        Box::pin(RecordBatchStreamAdapter::new(schema, counted))
    }

    /// Replaces the message, for work that is not counted in rows. The first message is logged at once.
    pub fn say(&self, done: u64, message: String) {
        self.0.bar.set_position(done);
        self.0.bar.set_message(message.clone());
        if !self.0.terminal && !self.0.silent && self.0.lines.is_time() {
            tracing::info!("{}: {message}", self.0.name);
        }
    }

    fn message(&self, rows: u64, tokens: u64, bytes: u64) -> String {
        let seconds = self.0.started.elapsed().as_secs_f64().max(1e-3);
        let mut parts = vec![];
        if rows > 0 {
            parts.push(format!("{} rows", HumanCount(rows)));
        }
        if tokens > 0 {
            parts.push(format!("{} tokens", HumanCount(tokens)));
        }
        if bytes > 0 {
            parts.push(format!("{:.1} MB/s", bytes as f64 / 1e6 / seconds));
        }
        parts.join(", ")
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
