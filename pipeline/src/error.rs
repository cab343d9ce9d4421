//! The error type of this crate, and the exit code of each kind of error.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use miette::{Diagnostic, NamedSource, SourceSpan};
use thiserror::Error;

use crate::secret::hide;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A tokenizer that can't be loaded, or a text it can't encode.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("{name} is not a tokenizer.json that can be used: {message}")]
    Unusable { name: String, message: String },
    #[error("the tokenizer failed on a text: {0}")]
    Failed(String),
    #[error("no tokenizer could be trained: {0}")]
    NotTrained(String),
}

/// The exit codes of the program.
pub const EXIT_CODES: [(u8, &str); 7] = [
    (0, "done"),
    (
        2,
        "the command line, the conf, a recipe or a variable is wrong, or names what isn't there or can't be read or written",
    ),
    (3, "the data is not what the conf says: too many rejected rows, a budget out of reach"),
    (
        4,
        "storage or the operating system refused, which may pass; the same command goes on where this one was",
    ),
    (5, "a digest or a sum differs: something is broken or was changed"),
    (6, "training failed"),
    (
        75,
        "stopped by SIGTERM or SIGINT; the same command goes on where this one was (`reproduce` begins anew)",
    ),
];

/// The errors of this crate, grouped by who can fix the cause.
#[derive(Debug, Error, Diagnostic)]
pub enum Error {
    /// A mistake in something the user wrote (a conf, a recipe, a `--set`); points at the place.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Written(#[from] Box<Written>),

    /// The input data is not what the conf states.
    #[error("{message}")]
    Data {
        message: String,
        #[help]
        help: Option<String>,
    },

    /// The command line asks for something impossible.
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

    /// A stored file does not have the digest that its manifest states, or cannot be read.
    #[error("{url}: {message}")]
    #[diagnostic(help(
        "`lengthwise verify RUN` withdraws what is broken; the next `lengthwise run` computes it again"
    ))]
    Corrupt { url: String, message: String },

    /// A stored file did not have the digest that its manifest states, and the output of its stage was
    /// withdrawn.
    #[error("{url} was broken, and is withdrawn")]
    #[diagnostic(help("the next `lengthwise run` computes it again"))]
    Withdrawn { url: String },

    /// The rows or tokens of a stage do not add up to those of its inputs.
    #[error("stage {stage} does not account for its input: {message}")]
    #[diagnostic(help(
        "this is a bug in lengthwise: nothing was published; please report it with the run's manifest"
    ))]
    Unbalanced { stage: &'static str, message: String },

    /// A command needs the output of a stage that has not been computed.
    #[error("stage {stage} has not been computed for this conf")]
    #[diagnostic(help("`lengthwise run CONF --until {stage}` computes it"))]
    Absent { stage: &'static str, key: String, ingredients: BTreeMap<String, serde_json::Value> },

    /// Two digests that should be equal are not.
    #[error("{0}")]
    Differs(String),

    /// A query could not be planned or failed while it ran.
    #[error("{doing}: {cause}")]
    Query {
        doing: String,
        // not a `source`, because its message already includes its causes
        cause: Box<datafusion::error::DataFusionError>,
        #[help]
        help: Option<String>,
    },

    /// A tokenizer that can't be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),

    /// The model cannot be trained or evaluated.
    #[cfg(feature = "train")]
    #[error("{}", model_failed(.0))]
    Train(#[from] lengthwise_model::Error),

    /// The error of a task that failed on an executor.
    #[error("{message}")]
    Remote {
        code: u8,
        message: String,
        #[help]
        help: Option<String>,
    },

    /// A cluster cannot be reached, or loses tasks.
    #[error("the cluster at {url}: {message}")]
    #[diagnostic(help(
        "`lengthwise cluster scheduler` and `lengthwise cluster executor` have to run there; the same command goes on where this one was"
    ))]
    Cluster { url: String, message: String },

    /// SIGTERM or SIGINT ended the run. Nothing half-done was published, and the same command continues from
    /// here.
    #[error("stopped by a signal; the same command goes on where this one was")]
    Stopped,

    /// Any other error of the operating system.
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
    /// An error in a text that the user wrote. `span` is a byte range of `text`, and `label` is shown under
    /// it.
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

    /// The causes of the error, the nearest first. Libraries often repeat a cause in their own message; a
    /// cause that was already stated is left out.
    pub fn causes(&self) -> Vec<String> {
        let mut said: Vec<String> = vec![];
        for cause in chain(self) {
            if !said.iter().any(|before| before.contains(&cause)) {
                said.push(cause);
            }
        }
        said.split_off(1)
    }

    /// The file, the line and the label of a mistake in the user's text; `None` for other errors.
    pub fn place(&self) -> Option<String> {
        let Error::Written(written) = self else { return None };
        let Written { text, span, label, .. } = &**written;
        let Some(span) = span else { return Some(text.name().to_owned()) };
        let line = text.inner()[..span.offset().min(text.inner().len())].matches('\n').count() + 1;
        Some(format!("{}:{line}: {label}", text.name()))
    }

    /// The error as a terminal shows it: what is wrong, where, why, and what to do.
    pub fn shown(self) -> miette::Report {
        let mut cause = None;
        for message in self.causes().into_iter().rev() {
            cause = Some(Box::new(Cause { message, cause }));
        }
        Shown { error: self, cause }.into()
    }

    /// The error and its causes on one line.
    pub fn in_a_line(&self) -> String {
        [vec![self.to_string()], self.causes()].concat().join(": ")
    }

    /// The exit code of the process, one of [`EXIT_CODES`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Written(_) | Error::Usage { .. } | Error::Absent { .. } => 2,
            Error::Data { .. } | Error::Query { .. } | Error::Tokenizer(_) => 3,
            Error::Storage { source, .. } => {
                if cure(source).is_some() {
                    2
                } else {
                    4
                }
            }
            Error::Io { source, .. } => match source.kind() {
                // std reports a text that is not UTF-8 as InvalidData
                ErrorKind::InvalidData => 2,
                kind if is_lasting(kind) => 2,
                _ => 4,
            },
            Error::Cluster { .. } => 4,
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
                lengthwise_model::Error::Storage { source, .. } => {
                    if cure(source).is_some() {
                        2
                    } else {
                        4
                    }
                }
                _ => 6,
            },
            Error::Stopped => 75,
        }
    }
}

/// The messages of an error and of each of its causes, with secrets hidden.
pub fn chain(error: &Link) -> impl Iterator<Item = String> {
    links(error).map(|error| hide(error.to_string()))
}

/// An error and each of its causes.
fn links(error: &Link) -> impl Iterator<Item = &Link> {
    std::iter::successors(Some(error), |error| error.source())
}

type Link = dyn std::error::Error + 'static;

/// An error whose chain of causes is [`Error::causes`].
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

/// The headline for an error of the model crate.
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

/// Advice for a storage error.
fn storage_help(url: &str, why: &object_store::Error) -> String {
    if let Some(cure) = cure(why) {
        return cure.to_owned();
    }
    let look = what_to_look_at(url, why).map(|look| look + "; ").unwrap_or_default();
    look + "the same command goes on where this one was"
}

/// What the user has to change, if trying again cannot help; `None` if it may help.
fn cure(why: &object_store::Error) -> Option<&'static str> {
    for link in links(why) {
        match link.downcast_ref() {
            // the object was there a moment ago, unless the whole bucket is missing
            Some(object_store::Error::NotFound { .. }) => break,
            Some(object_store::Error::InvalidPath { .. }) => {
                return Some(
                    "the name is none that can be read here: parts of it are empty, or it has characters that are not UTF-8, or control characters; rename what is called so, or name a folder or glob without it",
                );
            }
            _ => {}
        }
        if let Some(kind) = link.downcast_ref().map(std::io::Error::kind).filter(|kind| is_lasting(*kind)) {
            return Some(match kind {
                ErrorKind::NotADirectory => "a part of the path is a file, and a folder is wanted there",
                ErrorKind::IsADirectory => "it is a folder, and a file is wanted there",
                ErrorKind::PermissionDenied => {
                    "this user may not do it: change whose it is, or name another place"
                }
                _ => "name another place",
            });
        }
    }
    let why = chain(why).collect::<Vec<_>>().join("\n");
    let is_gone = ["NoSuchBucket", "ContainerNotFound", "specified bucket does not exist"];
    is_gone
        .iter()
        .any(|sign| why.contains(sign))
        .then_some("there is no such bucket: make it, or name another one")
}

/// Whether an I/O error lasts until somebody changes something. A full disk is not such an error, because
/// other users of the disk may free space.
fn is_lasting(kind: ErrorKind) -> bool {
    use ErrorKind::*;
    [
        NotFound,
        NotADirectory,
        IsADirectory,
        PermissionDenied,
        ReadOnlyFilesystem,
        InvalidFilename,
        AlreadyExists,
        Unsupported,
    ]
    .contains(&kind)
}

/// The environment variables that configure storage of a scheme, as a sentence.
pub fn variables(scheme: &str) -> Option<&'static str> {
    match scheme {
        "s3" | "s3a" => Some(
            "credentials and endpoint come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT",
        ),
        "gs" => Some(
            "credentials come from the environment: GOOGLE_SERVICE_ACCOUNT, GOOGLE_APPLICATION_CREDENTIALS",
        ),
        "az" | "azure" | "abfs" | "abfss" | "adl" => Some(
            "credentials come from the environment: AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
        ),
        _ => None,
    }
}

/// What to check before trying again; `None` for paths without a scheme, whose errors are clear by
/// themselves.
fn what_to_look_at(url: &str, why: &object_store::Error) -> Option<String> {
    let why = chain(why).collect::<Vec<_>>().join("\n");
    let says = |signs: &[&str]| signs.iter().any(|sign| why.contains(sign));
    let variables = variables(url.split_once("://")?.0)?;
    // messages of storage services, and the metadata addresses that clouds give credentials at
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
    if says(&["RequestTimeTooSkewed", "Request date header too old"]) {
        return Some("this machine's clock is wrong: storage wants requests of its own time".into());
    }
    let refused =
        ["SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "AccessDenied", "403 Forbidden"];
    let refused = says(&refused).then_some("the credentials are wrong, expired, or not allowed to do this; ");
    Some(refused.unwrap_or_default().to_owned() + variables)
}

/// Adds to an I/O error what was being done.
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
            ("403 Forbidden: <Code>RequestTimeTooSkewed</Code>", "clock is wrong"),
            ("403 Forbidden: <Code>SignatureDoesNotMatch</Code>", "wrong, expired, or not allowed"),
            ("500", "AWS_ENDPOINT"),
        ] {
            // an object's name must not be taken for a sign of the cause
            let answer = format!("{answer}: GET http://storage/certificates/x");
            let error = refused("s3://bucket/certificates/x", &answer);
            let help = error.help().expect("there is help").to_string();
            assert!(help.contains(cure) && help.ends_with("where this one was"), "{help}");
            // the library's message already contains its cause
            assert_eq!(error.causes(), [format!("Generic S3 error: {answer}")]);
            let shown = format!("{:?}", error.shown());
            assert_eq!(shown.matches("Generic S3 error").count(), 1, "{shown}");
        }
    }

    #[test]
    fn a_scheduler_is_told_to_try_again_only_where_that_may_help() {
        use std::io::Error as Io;
        let generic = |source: Io| object_store::Error::Generic { store: "disk", source: source.into() };
        let store = |source| Error::Storage { doing: "read", url: "/data/x".into(), source };
        let missing =
            |why: &str| object_store::Error::NotFound { path: "x".into(), source: why.to_owned().into() };
        let path = object_store::path::Path::parse("a//b").unwrap_err().into();
        let io = |source: Io| Error::Io { doing: "cannot do it".into(), source };
        let of = Io::from_raw_os_error;
        for (code, error) in [
            // errors that last until somebody changes something
            (2, store(path)),
            (2, store(generic(of(libc::ENOTDIR)))),
            (2, store(generic(of(libc::EISDIR)))),
            (2, store(generic(of(libc::EACCES)))),
            (2, store(generic(of(libc::EPERM)))),
            (2, store(generic(of(libc::EROFS)))),
            (2, store(generic(of(libc::ENAMETOOLONG)))),
            (2, store(missing("404 Not Found: <Code>NoSuchBucket</Code>"))),
            (2, store(missing("404: <Code>ContainerNotFound</Code>"))),
            (2, refused("gs://nowhere/x", "404: The specified bucket does not exist.")),
            (2, io(of(libc::ENOENT))),
            (2, io(of(libc::EISDIR))),
            (2, io(of(libc::EEXIST))),
            (2, io(of(libc::EACCES))),
            (2, io(ErrorKind::InvalidData.into())),
            (2, Error::usage("", "")),
            (3, Error::data("", "")),
            // errors that may pass by themselves
            (4, store(generic(of(libc::ENOSPC)))),
            (4, store(generic(of(libc::EIO)))),
            (4, store(generic(of(libc::EDQUOT)))),
            (4, store(generic(of(libc::EMFILE)))),
            (4, store(generic(of(libc::ETIMEDOUT)))),
            (4, store(missing("404 Not Found: <Code>NoSuchKey</Code>"))),
            (4, store(object_store::Error::NotFound { path: "x".into(), source: of(libc::ENOENT).into() })),
            (4, refused("s3://bucket/x", "503 Slow Down")),
            // credentials may be renewed meanwhile
            (4, refused("s3://bucket/x", "403 Forbidden: <Code>ExpiredToken</Code>")),
            (4, refused("s3://bucket/x", "client error (Connect): tcp connect error: Connection refused")),
            (4, io(of(libc::ENOSPC))),
            (4, io(of(libc::EIO))),
            (4, io(of(libc::EAGAIN))),
            (4, io(of(libc::EADDRINUSE))),
            (4, Error::Cluster { url: String::new(), message: String::new() }),
            (5, Error::Differs(String::new())),
            (5, Error::Corrupt { url: String::new(), message: String::new() }),
            (75, Error::Stopped),
        ] {
            assert_eq!(error.exit_code(), code, "{}", error.in_a_line());
            let help = error.help().map(|help| help.to_string()).unwrap_or_default();
            assert!(code == 4 || !help.contains("the same command goes on"), "{help}");
            #[cfg(feature = "train")]
            if let Error::Storage { doing, url, source } = error {
                let error = Error::Train(lengthwise_model::Error::Storage { doing, path: url, source });
                assert_eq!(error.exit_code(), code, "{}", error.in_a_line());
            }
        }
    }
}
