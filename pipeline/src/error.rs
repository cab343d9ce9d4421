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
    #[diagnostic(help("{}", storage_help(url, source)))]
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
    #[error("{doing}: {cause}")]
    Query {
        doing: String,
        // not its `source`: it says its own causes
        cause: Box<datafusion::error::DataFusionError>,
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

    /// Why it came about, the nearest cause first. Libraries say their causes twice, in their own message, too: what was said
    /// is left out.
    pub fn causes(&self) -> Vec<String> {
        let mut said: Vec<String> = vec![];
        for cause in chain(self) {
            if !said.iter().any(|before| before.contains(&cause)) {
                said.push(cause);
            }
        }
        said.split_off(1)
    }

    /// File and line of what the user wrote wrong, with what stands under it.
    pub fn place(&self) -> Option<String> {
        let Error::Written(written) = self else { return None };
        let Written { text, span, label, .. } = &**written;
        let Some(span) = span else { return Some(text.name().to_owned()) };
        let line = text.inner()[..span.offset().min(text.inner().len())].matches('\n').count() + 1;
        Some(format!("{}:{line}: {label}", text.name()))
    }

    /// As it is shown on a terminal: what is wrong, where, why, and what to do.
    pub fn shown(self) -> miette::Report {
        let mut cause = None;
        for message in self.causes().into_iter().rev() {
            cause = Some(Box::new(Cause { message, cause }));
        }
        Shown { error: self, cause }.into()
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
                // the command or the conf names the checkpoint
                lengthwise_model::Error::Conf(_) | lengthwise_model::Error::Checkpoint { .. } => 2,
                lengthwise_model::Error::Dataset { .. } => 3,
                lengthwise_model::Error::Storage { .. } => 4,
                _ => 6,
            },
            Error::Stopped => 75,
        }
    }
}

/// What an error says, and each of its causes.
pub fn chain(error: &dyn std::error::Error) -> impl Iterator<Item = String> {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string)
}

/// An error whose causes are those of [`Error::causes`].
#[derive(Debug, Error)]
#[error("{error}")]
struct Shown {
    error: Error,
    #[source]
    cause: Option<Box<Cause>>,
}

#[derive(Debug, Error)]
#[error("{message}")]
struct Cause {
    message: String,
    #[source]
    cause: Option<Box<Cause>>,
}

impl Diagnostic for Shown {
    fn help<'a>(&'a self) -> Option<Box<dyn std::fmt::Display + 'a>> {
        self.error.help()
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.error.source_code()
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = miette::LabeledSpan> + '_>> {
        self.error.labels()
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

/// What to do where storage refuses.
fn storage_help(url: &str, why: &object_store::Error) -> String {
    let cure = storage_cure(url, why).map(|cure| cure + "; ").unwrap_or_default();
    cure + "the same command goes on where this one was"
}

/// What to look at; `None` for a disk's errors, which say it themselves.
fn storage_cure(url: &str, why: &object_store::Error) -> Option<String> {
    let why = chain(why).collect::<Vec<_>>().join("\n");
    let says = |signs: &[&str]| signs.iter().any(|sign| why.contains(sign));
    let variables = match url.split_once("://").map(|(scheme, _)| scheme) {
        Some("s3" | "s3a") => {
            "credentials and endpoint come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT"
        }
        Some("gs") => {
            "credentials come from the environment: GOOGLE_SERVICE_ACCOUNT, GOOGLE_APPLICATION_CREDENTIALS"
        }
        Some("az" | "abfs" | "abfss" | "adl") => {
            "credentials come from the environment: AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY"
        }
        _ => return None,
    };
    // what stores say in their answers, and where clouds tell their machines who they are
    if says(&["URL scheme is not allowed"]) {
        return Some(
            "the endpoint is an http:// address: set AWS_ALLOW_HTTP=true where that is meant".into(),
        );
    }
    if says(&["169.254.169.254", "metadata.google.internal", "169.254.170.2"]) {
        return Some(format!("no credentials were found; {variables}"));
    }
    if says(&["invalid peer certificate"]) {
        return Some("the endpoint's certificate is not one that this machine trusts".into());
    }
    if says(&["client error (Connect)", "operation timed out"]) {
        let endpoint = if url.starts_with("s3") { "AWS_ENDPOINT, " } else { "" };
        return Some(format!(
            "no connection, or no answer in time: look at {endpoint}the network and the storage"
        ));
    }
    if says(&["NoSuchBucket", "ContainerNotFound", "specified bucket does not exist"]) {
        return Some("there is no such bucket: make it, or name another one".into());
    }
    if says(&["RequestTimeTooSkewed", "Request date header too old"]) {
        return Some("this machine's clock is wrong: storage wants requests of its own time".into());
    }
    let refused =
        ["SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "AccessDenied", "403 Forbidden"];
    let refused = says(&refused).then_some("the credentials are wrong, expired, or not allowed to do this; ");
    Some(refused.unwrap_or_default().to_owned() + variables)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str, answer: &str) -> Error {
        let source = object_store::Error::Generic { store: "S3", source: answer.to_owned().into() };
        Error::Storage { doing: "read", url: url.into(), source }
    }

    #[test]
    fn what_storage_refuses_is_said_once_with_its_cure() {
        for (answer, cure) in [
            ("HTTP error: URL scheme is not allowed", "AWS_ALLOW_HTTP=true"),
            ("Error performing PUT http://169.254.169.254/latest/api/token", "no credentials were found"),
            ("client error (Connect): tcp connect error: Connection refused", "no connection"),
            ("client error (Connect): invalid peer certificate: UnknownIssuer", "certificate"),
            ("404 Not Found: <Code>NoSuchBucket</Code>", "there is no such bucket"),
            ("403 Forbidden: <Code>RequestTimeTooSkewed</Code>", "clock is wrong"),
            ("403 Forbidden: <Code>SignatureDoesNotMatch</Code>", "wrong, expired, or not allowed"),
            ("500", "AWS_ENDPOINT"),
        ] {
            // what an object is called is no sign of anything
            let answer = format!("{answer}: GET http://storage/certificates/x");
            let error = refused("s3://bucket/certificates/x", &answer);
            let help = error.help().expect("there is help").to_string();
            assert!(help.contains(cure) && help.ends_with("where this one was"), "{help}");
            // the library's message has its cause's in it
            assert_eq!(error.causes(), [format!("Generic S3 error: {answer}")]);
            let shown = format!("{:?}", error.shown());
            assert_eq!(shown.matches("Generic S3 error").count(), 1, "{shown}");
        }
    }
}
