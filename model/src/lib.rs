//! Llama, its trainer and its checkpoints. The input is packed Parquet; SQL, recipes and URLs are the pipeline's concern.
//!
//! ```text
//! dataset ─▶ train ─▶ checkpoint
//!             │ each rank is a thread or a process (comm) with its rows of a sequence (ring) and its shard of the model (shards)
//!             │ a step runs forward and backward a layer at a time (backprop), then AdamW (optim)
//!             └ the model's layers (llama) know nothing of ranks; attention is an explicit forward/backward pair
//! ```

pub mod amount;
pub mod attention;
pub mod backprop;
pub mod checkpoint;
pub mod comm;
pub mod conf;
pub mod config;
pub mod dataset;
pub mod decoder;
pub mod device;
pub mod eval;
pub mod generate;
mod headers;
pub mod llama;
pub mod metrics;
pub mod optim;
pub mod plan;
#[cfg(test)]
mod reference;
pub mod resume;
pub mod ring;
pub mod rope;
pub mod shards;
pub mod tensors;
pub mod train;

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::{Path, PathPart};
use object_store::{ObjectStore, ObjectStoreExt};

pub use checkpoint::checkpoint_parts;
pub use conf::TrainConf;
pub use metrics::StepMetrics;
pub use train::{Summary, TrainJob, train};

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting or an argument is impossible.
    #[error("{0}")]
    Conf(String),
    /// The trainer can't read the packed dataset.
    #[error("{file}: {message}")]
    Dataset { file: String, message: String },
    /// A checkpoint is damaged, or is not of a Llama.
    #[error("checkpoint {at}: {message}")]
    Checkpoint { at: String, message: String },
    #[error("cannot {doing} {path}")]
    Storage {
        doing: &'static str,
        path: String,
        #[source]
        source: object_store::Error,
    },
    /// The loss or the gradients are not finite, or the gradient norm is far above the recent median.
    #[error(
        "step {step}: {what} (sequences {sequences:?}); the last good checkpoint is {good}, the steps so far are in {metrics}. Lower the learning rate, or warm up longer"
    )]
    Diverged { step: u64, what: String, sequences: Vec<u64>, good: String, metrics: String },
    /// A rank failed. The other ranks end with the same error.
    #[error("rank {rank}: {message}")]
    Rank { rank: usize, message: String },
    /// The caller asked the training to stop.
    #[error("training was stopped after step {0}")]
    Stopped(u64),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A folder or object in an object store.
#[derive(Clone, Debug)]
pub struct Location {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
    /// The URL of the store's root, such as `s3://bucket/` or `/`.
    pub base: String,
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    pub name: String,
    pub bytes: u64,
    pub blake3: [u8; 32],
}

impl Location {
    /// The location of `name` in this folder. Names are taken literally: `ü`, `%` and `#` are ordinary characters.
    pub fn join(&self, name: &str) -> Self {
        // `..` is no name, so it is escaped.
        let parts = name.split('/').map(|part| PathPart::parse(part).unwrap_or_else(|_| part.into()));
        Self { path: parts.fold(self.path.clone(), Path::join), ..self.clone() }
    }

    /// The URL, as a person would type it.
    pub fn url(&self) -> String {
        format!("{}{}", self.base, self.path)
    }

    /// The object's bytes; `None` if there is no object.
    pub async fn get(&self) -> Result<Option<Bytes>> {
        let got = async { self.store.get(&self.path).await?.bytes().await };
        match got.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(Error::Storage { doing: "read", path: self.url(), source }),
        }
    }

    /// The BLAKE3 digest of the object, which is read as a stream.
    pub async fn digest(&self) -> Result<[u8; 32]> {
        let failed = |source| Error::Storage { doing: "read", path: self.url(), source };
        let mut bytes = self.store.get(&self.path).await.map_err(failed)?.into_stream();
        let mut hasher = blake3::Hasher::new();
        while let Some(chunk) = bytes.try_next().await.map_err(failed)? {
            hasher.update(&chunk);
        }
        Ok(*hasher.finalize().as_bytes())
    }

    pub async fn put(&self, bytes: Vec<u8>) -> Result<Written> {
        let name = self.path.filename().unwrap_or_default().to_owned();
        let written = Written { name, bytes: bytes.len() as u64, blake3: *blake3::hash(&bytes).as_bytes() };
        let put = self.store.put(&self.path, bytes.into()).await;
        put.map_err(|source| Error::Storage { doing: "write", path: self.url(), source })?;
        Ok(written)
    }
}
