//! The one error type of this crate, and the exit code each kind of failure ends with.

use miette::{Diagnostic, NamedSource, SourceSpan};
use thiserror::Error;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, grouped by who can mend it.
#[derive(Debug, Error, Diagnostic)]
pub enum Error {
    /// Something the user wrote (a conf, a recipe, a `--set`) is wrong; points at the place.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Written(#[from] Box<Written>),

    /// The input data is not what the conf says it is.
    #[error("{message}")]
    Data {
        message: String,
        #[help]
        help: Option<String>,
    },

    /// The command line asks for something that can't be.
    #[error("{message}")]
    Usage {
        message: String,
        #[help]
        help: Option<String>,
    },

    /// Object storage or a file system refused, failed or timed out.
    #[error("cannot {doing} {url}")]
    #[diagnostic(help("{}", storage_help(url)))]
    Storage {
        doing: &'static str,
        url: String,
        #[source]
        source: object_store::Error,
    },

    /// A stored file is not what its manifest says.
    #[error("{url}: {message}")]
    #[diagnostic(help(
        "`lengthwise verify RUN` withdraws what is broken; the next `lengthwise run` computes it again"
    ))]
    Corrupt { url: String, message: String },

    /// A stored file was not what its manifest says, and its stage's output is withdrawn.
    #[error("{url} was broken, and is withdrawn")]
    #[diagnostic(help("the next `lengthwise run` computes it again"))]
    Withdrawn { url: String },

    /// The rows or tokens of a stage do not add up to those of its inputs.
    #[error("stage {stage} does not account for its input: {message}")]
    #[diagnostic(help(
        "this is a bug in lengthwise: nothing was published; please report it with the run's manifest"
    ))]
    Unbalanced { stage: &'static str, message: String },

    /// Asked for something of a stage that has not been computed.
    #[error("stage {stage} has not been computed for this conf")]
    #[diagnostic(help("`lengthwise run CONF --until {stage}` computes it"))]
    Absent { stage: &'static str, key: String, ingredients: crate::stage::Ingredients },

    /// Two digests that should be equal are not.
    #[error("{0}")]
    Differs(String),

    /// A query failed while it ran.
    #[error("{doing}: {source}")]
    Query {
        doing: String,
        #[source]
        source: Box<datafusion::error::DataFusionError>,
        #[help]
        help: Option<String>,
    },

    /// A tokenizer that can't be used.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::TokenizerError),

    /// The model can't be trained or asked.
    #[cfg(feature = "train")]
    #[error("{}", model_failed(.0))]
    Train(#[from] lengthwise_model::Error),

    /// What a task ended with on an executor.
    #[error("{message}")]
    Remote {
        code: u8,
        message: String,
        #[help]
        help: Option<String>,
    },

    /// A cluster can't be reached, or loses what it is given.
    #[error("the cluster at {url}: {message}")]
    #[diagnostic(help(
        "`lengthwise cluster scheduler` and `lengthwise cluster executor` have to run there; the same command goes on where this one was"
    ))]
    Cluster { url: String, message: String },

    /// SIGTERM or SIGINT: nothing half-done was published, the same command goes on from here.
    #[error("stopped by a signal; the same command goes on where this one was")]
    Stopped,

    /// Everything else that an operating system can refuse.
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
}

/// An error with a place in a text the user wrote.
#[derive(Debug, Error, Diagnostic)]
#[error("{message}")]
pub struct Written {
    pub message: String,
    #[source_code]
    pub text: NamedSource<String>,
    #[label("{label}")]
    pub span: Option<SourceSpan>,
    pub label: String,
    #[help]
    pub help: Option<String>,
}

impl Error {
    /// A wrong place in a text the user wrote. `span` is a byte range of `text`; `label` stands under it.
    pub fn written(
        file: &str,
        text: &str,
        span: Option<std::ops::Range<usize>>,
        message: impl Into<String>,
        label: impl Into<String>,
        help: Option<String>,
    ) -> Self {
        Error::Written(Box::new(Written {
            message: message.into(),
            text: NamedSource::new(file, text.to_owned()),
            span: span.map(Into::into),
            label: label.into(),
            help,
        }))
    }

    /// Wrong or unusable input data.
    pub fn data(message: impl Into<String>, help: impl Into<String>) -> Self {
        Error::Data { message: message.into(), help: Some(help.into()) }
    }

    /// A wrong command line.
    pub fn usage(message: impl Into<String>, help: impl Into<String>) -> Self {
        Error::Usage { message: message.into(), help: Some(help.into()) }
    }

    /// Why it came about, the nearest cause first.
    pub fn causes(&self) -> Vec<String> {
        let first = std::error::Error::source(self);
        std::iter::successors(first, |cause| cause.source()).map(ToString::to_string).collect()
    }

    /// The error and its causes in a line.
    pub fn in_a_line(&self) -> String {
        [vec![self.to_string()], self.causes()].concat().join(": ")
    }

    /// The exit code of the process, as documented in the README.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Written(_) | Error::Usage { .. } | Error::Absent { .. } => 2,
            Error::Data { .. } | Error::Query { .. } | Error::Tokenizer(_) => 3,
            Error::Storage { .. } | Error::Io { .. } | Error::Cluster { .. } => 4,
            Error::Remote { code, .. } => *code,
            Error::Corrupt { .. }
            | Error::Withdrawn { .. }
            | Error::Unbalanced { .. }
            | Error::Differs(_) => 5,
            #[cfg(feature = "train")]
            Error::Train(error) => match error {
                lengthwise_model::Error::Conf(_) => 2,
                lengthwise_model::Error::Storage { .. } => 4,
                _ => 6,
            },
            Error::Stopped => 75,
        }
    }
}

/// The headline over a failure of the model crate.
#[cfg(feature = "train")]
fn model_failed(error: &lengthwise_model::Error) -> &'static str {
    match error {
        lengthwise_model::Error::Conf(_) => "the model can't do what is asked",
        lengthwise_model::Error::Checkpoint { .. } => "a checkpoint can't be used",
        lengthwise_model::Error::Dataset { .. } => "a dataset can't be used",
        lengthwise_model::Error::Storage { .. } => "storage refused",
        _ => "training failed",
    }
}

/// What to look at where storage refuses.
fn storage_help(url: &str) -> &'static str {
    match url.split_once("://").map(|(scheme, _)| scheme) {
        Some("s3" | "s3a") => {
            "credentials and endpoint come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT; the same command goes on where this one was"
        }
        Some("gs") => {
            "credentials come from the environment: GOOGLE_SERVICE_ACCOUNT, GOOGLE_APPLICATION_CREDENTIALS; the same command goes on where this one was"
        }
        Some("az" | "abfs" | "abfss" | "adl") => {
            "credentials come from the environment: AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY; the same command goes on where this one was"
        }
        _ => "the same command goes on where this one was",
    }
}

/// Attaches what was being done to an I/O error.
pub trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { doing: what(), source })
    }
}
