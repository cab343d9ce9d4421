//! Training checkpoints: a folder `step-N/` with the model in Hugging Face's layout, each rank's parameters and optimizer
//! state, the metrics so far, and a manifest. The manifest is written last; a folder without one is ignored.

use std::ops::Range;

use burn_tensor::Tensor;
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::comm::Comm;
use crate::conf::Precision;
use crate::optim::AdamW;
use crate::shards::{Shards, Unit};
use crate::tensors::{Reader, Writer};
use crate::{Error, Location, Result, Written};

const MANIFEST: &str = "manifest.json";

/// What is saved of each number in a rank's shards: the f32 parameter and AdamW's moments.
const STATES: [&str; 3] = ["master", "first", "second"];

/// How many checkpoints are kept.
const CHECKPOINTS_KEPT: usize = 2;

/// A checkpoint's manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    pub step: u64,
    /// How many ranks wrote it.
    pub ranks: usize,
    /// The digest of the dataset.
    pub dataset: String,
    /// The settings that determine the trained model.
    pub settings: Value,
    /// The checkpoint's files, without logs.
    pub files: Vec<ManifestFile>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ManifestFile {
    pub name: String,
    pub bytes: u64,
    /// The digest in hexadecimal.
    pub blake3: String,
}

impl From<Written> for ManifestFile {
    fn from(written: Written) -> Self {
        let blake3 = blake3::Hash::from_bytes(written.blake3).to_hex().to_string();
        Self { name: written.name, bytes: written.bytes, blake3 }
    }
}

/// A checkpoint from which training can resume.
pub struct TrainingCheckpoint {
    pub folder: Location,
    pub manifest: Manifest,
    ranks: Vec<Reader>,
}

pub fn optimizer_file(rank: usize, ranks: usize) -> String {
    format!("optimizer-{rank:05}-of-{ranks:05}.safetensors")
}

/// The steps that have a folder, the latest first.
async fn steps(checkpoints: &Location) -> Result<Vec<u64>> {
    let listed = checkpoints.store.list_with_delimiter(Some(&checkpoints.path)).await;
    let listed =
        listed.map_err(|source| Error::Storage { doing: "list", path: checkpoints.url(), source })?;
    let number = |path: &object_store::path::Path| path.filename()?.strip_prefix("step-")?.parse().ok();
    let mut steps: Vec<u64> = listed.common_prefixes.iter().filter_map(number).collect();
    steps.sort_by_key(|step| std::cmp::Reverse(*step));
    Ok(steps)
}

/// The manifest of the latest checkpoint in a folder, if there is one.
pub async fn latest(checkpoints: &Location) -> Result<Option<Manifest>> {
    for step in steps(checkpoints).await? {
        let folder = checkpoints.join(&format!("step-{step}"));
        let Some(manifest) = folder.join(MANIFEST).get().await? else { continue };
        let wrong = |e| Error::Checkpoint { at: folder.url(), message: format!("{MANIFEST}: {e}") };
        return serde_json::from_slice(&manifest).map(Some).map_err(wrong);
    }
    Ok(None)
}

impl TrainingCheckpoint {
    /// The latest checkpoint in a folder, if there is one.
    ///
    /// # Errors
    /// It has another dataset or other settings, or one of its files is missing or has another size.
    pub async fn find_latest(
        checkpoints: &Location,
        dataset: &str,
        settings: &Value,
    ) -> Result<Option<Self>> {
        let Some(manifest) = latest(checkpoints).await? else { return Ok(None) };
        let folder = checkpoints.join(&format!("step-{}", manifest.step));
        let wrong = |message: String| Error::Checkpoint { at: folder.url(), message };
        if manifest.dataset != dataset {
            return Err(wrong("it was trained on another dataset, so training can't resume from it".into()));
        }
        if &manifest.settings != settings {
            return Err(wrong("it was trained with other settings, so training can't resume from it".into()));
        }
        for ManifestFile { name, bytes: size, .. } in &manifest.files {
            let at = folder.join(name);
            match at.store.head(&at.path).await {
                Ok(meta) if meta.size == *size => {}
                Ok(meta) => {
                    return Err(wrong(format!("{name} has {} bytes instead of {size}", meta.size)));
                }
                Err(object_store::Error::NotFound { .. }) => {
                    return Err(wrong(format!("there is no {name}")));
                }
                Err(source) => {
                    return Err(Error::Storage { doing: "read", path: at.url(), source });
                }
            }
        }
        let mut ranks = vec![];
        for rank in 0..manifest.ranks {
            ranks.push(Reader::open(folder.join(&optimizer_file(rank, manifest.ranks))).await?);
        }
        Ok(Some(Self { folder, manifest, ranks }))
    }

    /// Compares the digests of this rank's share of the files: after a crash, a file may have its size but not its contents.
    ///
    /// # Errors
    /// A file differs from what was written.
    pub async fn verify(&self, comm: &dyn Comm) -> Result<()> {
        for file in self.manifest.files.iter().skip(comm.rank()).step_by(comm.size()) {
            let digest = self.folder.join(&file.name).digest().await?;
            if blake3::Hash::from_bytes(digest).to_hex().as_str() != file.blake3 {
                let message = format!(
                    "{} is not what was written; remove this folder to resume from the checkpoint before",
                    file.name
                );
                return Err(Error::Checkpoint { at: self.folder.url(), message });
            }
        }
        Ok(())
    }

    /// Reads a range of a unit's numbers, from the files of whichever ranks wrote them.
    async fn read(&self, unit: &Unit, index: usize, part: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let mut numbers = Vec::with_capacity(range.len());
        for (rank, reader) in self.ranks.iter().enumerate() {
            let owned = unit.shard_range(rank, self.ranks.len());
            let both = range.start.max(owned.start)..range.end.min(owned.end);
            if both.start < both.end {
                let local = both.start - owned.start..both.end - owned.start;
                numbers.extend(reader.read(&format!("{index}.{part}"), local).await?);
            }
        }
        Ok(numbers)
    }

    /// This rank's parameters and optimizer. The number of ranks may differ from when they were written.
    pub fn restore(
        &self,
        units: Vec<Unit>,
        comm: &dyn Comm,
        device: &burn_tensor::Device,
        weight_decay: f64,
        runtime: &tokio::runtime::Handle,
    ) -> Result<(Shards, AdamW)> {
        let part = |part: &str| {
            let read = |i: usize, range| runtime.block_on(self.read(&units[i], i, part, range));
            Shards::new(units.clone(), comm, device, read)
        };
        let [shards, first, second] = STATES.map(part);
        let optimizer = AdamW {
            first_moment: first?.owned,
            second_moment: second?.owned,
            steps: self.manifest.step,
            weight_decay,
        };
        Ok((shards?, optimizer))
    }
}

/// Writes this rank's parameters and optimizer state.
pub async fn write_optimizer_shard(
    folder: &Location,
    comm: &dyn Comm,
    shards: &Shards,
    optimizer: &AdamW,
) -> Result<Written> {
    let (rank, ranks) = (comm.rank(), comm.size());
    let mut names = vec![];
    let mut tensors: Vec<(&Tensor<1>, usize)> = vec![];
    for (i, unit) in shards.units.iter().enumerate() {
        let length = unit.shard_range(rank, ranks).len();
        for (part, owned) in
            STATES.iter().zip([&shards.owned, &optimizer.first_moment, &optimizer.second_moment])
        {
            names.push((format!("{i}.{part}"), vec![length]));
            tensors.push((&owned[i], length));
        }
    }
    let mut writer =
        Writer::create(folder.join(&optimizer_file(rank, ranks)), Precision::F32, &names).await?;
    for (tensor, length) in tensors {
        let numbers: Vec<f32> = tensor.clone().into_data().iter::<f32>().take(length).collect();
        writer.write(&numbers).await?;
    }
    writer.finish().await
}

/// Publishes a checkpoint, whose other files are written already, by its manifest. Removes all but the latest
/// [`CHECKPOINTS_KEPT`].
pub async fn publish(checkpoints: &Location, manifest: &Manifest) -> Result<()> {
    let folder = checkpoints.join(&format!("step-{}", manifest.step));
    folder.join(MANIFEST).put(serde_json::to_vec_pretty(manifest).unwrap_or_default()).await?;
    for step in
        steps(checkpoints).await?.into_iter().filter(|step| *step <= manifest.step).skip(CHECKPOINTS_KEPT)
    {
        remove(&checkpoints.join(&format!("step-{step}"))).await?;
    }
    Ok(())
}

/// Removes all checkpoints of a training that is complete.
pub async fn clear(checkpoints: &Location) -> Result<()> {
    for step in steps(checkpoints).await? {
        remove(&checkpoints.join(&format!("step-{step}"))).await?;
    }
    Ok(())
}

/// Removes a checkpoint, its manifest first, so that no reader finds half of it.
async fn remove(folder: &Location) -> Result<()> {
    let failed = |source| Error::Storage { doing: "remove", path: folder.url(), source };
    let manifest = folder.join(MANIFEST).path;
    match folder.store.delete(&manifest).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
        Err(source) => return Err(failed(source)),
    }
    let listed: Vec<_> = folder.store.list(Some(&folder.path)).try_collect().await.map_err(failed)?;
    for meta in listed {
        // Another training may remove the same file at the same time.
        match folder.store.delete(&meta.location).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(source) => return Err(failed(source)),
        }
    }
    Ok(())
}
