//! Llama, its trainer and its checkpoints, fed by packed Parquet. Knows nothing of SQL, recipes or URLs.
//!
//! ```text
//! dataset ─▶ train ─▶ checkpoint
//!             │ a step: forward and backward a layer at a time (backprop), AdamW (optim)
//!             └ the model file (llama) knows nothing of training; attention is an explicit forward/backward pair
//! ```

pub mod attention;
pub mod backprop;
pub mod checkpoint;
pub mod dataset;
pub mod llama;
pub mod optim;
pub mod train;

use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

pub use checkpoint::checkpoint_parts;
pub use train::{Step, Summary, TrainConf, TrainJob, train};

/// What can go wrong in the model crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The `[train]` table asks for something that can't be.
    #[error("{0}")]
    Conf(String),
    /// The packed dataset is not what a trainer can read.
    #[error("{file}: {message}")]
    Dataset { file: String, message: String },
    /// A checkpoint's config or tensors are not those of a Llama.
    #[error("checkpoint {at}: {message}")]
    Checkpoint { at: String, message: String },
    #[error("cannot {doing} {path}")]
    Storage {
        doing: &'static str,
        path: String,
        #[source]
        source: object_store::Error,
    },
    /// The loss is no number any more.
    #[error("the loss of step {step} is {loss}; lower the learning rate, or warm up longer")]
    Diverged { step: u64, loss: f64 },
    /// The caller said to stop.
    #[error("training was stopped after step {0}")]
    Stopped(u64),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A folder or object in an object store.
#[derive(Clone, Debug)]
pub struct Location {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
}

impl Location {
    /// What lies at `name` in this folder.
    pub fn join(&self, name: &str) -> Self {
        Self { store: self.store.clone(), path: self.path.clone().join(name) }
    }

    /// The object's bytes; `None` where there is none.
    pub async fn get(&self) -> Result<Option<Bytes>> {
        let got = async { self.store.get(&self.path).await?.bytes().await };
        match got.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(Error::Storage { doing: "read", path: self.path.to_string(), source }),
        }
    }

    pub async fn put(&self, bytes: Vec<u8>) -> Result<()> {
        let put = self.store.put(&self.path, bytes.into()).await;
        put.map_err(|source| Error::Storage { doing: "write", path: self.path.to_string(), source })?;
        Ok(())
    }
}
