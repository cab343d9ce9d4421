//! How a stage's output is named, published and found again.
//!
//! ```text
//! <output>/stages/<stage>/<key>/      key: hash of everything the output depends on
//!     begun                           written first: its age tells `gc` whether a run is at work here
//!     *.parquet …                     files, written in any order, by any number of attempts
//!     jobs/<job>.json                 the output of a finished job; a run that was killed resumes after it
//!     manifest.json                   written last, if absent: from now on the output exists
//! ```
//!
//! What has no manifest does not exist. Two runs that compute the same key write the same bytes under the
//! same names, so that neither can harm the other. The first to finish publishes.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hash::{Digest, RowDigest};
use crate::storage::{Location, sealed};
use crate::{Error, Result};

/// Everything that a stage's output depends on, by name. The stage's key is their hash.
pub type Ingredients = BTreeMap<String, Value>;

/// Describes a stage's output: its tables and files, with digests of bytes and of rows.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Manifest {
    /// The stage's name.
    pub stage: String,
    /// The hash of all that the output depends on.
    pub key: String,
    /// All that the output depends on, by name.
    pub ingredients: Ingredients,
    /// The tables of the output, by name.
    pub tables: BTreeMap<String, Table>,
    /// Counts by name, which the accounts are checked with: documents, tokens, rejects, …
    pub counts: BTreeMap<String, u64>,
    /// Facts for later stages and the report that are in no table.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub notes: Value,
}

/// A source file that was read.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Input {
    /// Where the file was read.
    pub url: String,
    /// The file's size.
    pub bytes: u64,
    /// The digest of the file's bytes.
    pub blake3: Digest,
}

/// The key of a stage.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct StageKey {
    /// The stage's name.
    pub stage: String,
    /// The name of its folder below `stages/STAGE/`.
    pub key: String,
}

/// A table, or another set of files that belong together.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Table {
    /// How many rows it has.
    pub rows: u64,
    /// The digest of the rows, independent of their order, over the columns that are content. Locations are
    /// not content.
    pub digest: RowDigest,
    /// Its files.
    pub files: Vec<File>,
}

/// One stored file.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct File {
    /// Its path, from the folder of the manifest.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// How many rows it has.
    pub rows: u64,
    /// The digest of its bytes.
    pub blake3: Digest,
}

impl Table {
    pub fn extend(&mut self, other: Table) {
        self.rows += other.rows;
        self.digest.add(other.digest);
        self.files.extend(other.files);
    }
}

/// An output of a stage that exists.
#[derive(Clone, Debug)]
pub struct Published {
    pub manifest: Arc<Manifest>,
    pub folder: Location,
    /// Whether it existed before.
    pub cached: bool,
    pub seconds: f64,
}

impl Published {
    /// The table of this name; empty if the stage wrote none.
    pub fn table(&self, name: &str) -> Table {
        self.manifest.tables.get(name).cloned().unwrap_or_default()
    }

    pub fn count(&self, name: &str) -> u64 {
        self.manifest.counts.get(name).copied().unwrap_or(0)
    }

    /// The stage's notes.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the notes do not have the form `T`, for example because another version wrote
    /// them.
    pub fn notes<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.manifest.notes.clone()).map_err(|e| Error::Corrupt {
            url: self.folder.join("manifest.json").url(),
            message: e.to_string(),
        })
    }

    /// The row digest of a table, as the ingredient of a later stage.
    pub fn digest(&self, table: &str) -> Value {
        Value::String(self.table(table).digest.to_string())
    }
}

/// The key of a stage: a hash of its name and its ingredients, which include its version.
pub fn key(stage: &str, ingredients: &Ingredients) -> String {
    let text = serde_json::to_string(&(stage, ingredients)).expect("JSON values print");
    Digest::of(text.as_bytes()).short()
}

/// A stage's output while it is computed: the folder that jobs write to.
pub struct Draft {
    pub folder: Location,
    /// Whether jobs that an earlier attempt finished are repeated (`--from`).
    pub again: bool,
}

/// The result of a job: the tables that it added to, and its counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Output {
    pub tables: BTreeMap<String, Table>,
    pub counts: BTreeMap<String, u64>,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub notes: Value,
}

impl Output {
    pub fn count(&mut self, name: &str, add: u64) {
        *self.counts.entry(name.to_owned()).or_default() += add;
    }

    pub fn counted(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    pub fn table(&mut self, name: &str, table: Table) {
        self.tables.entry(name.to_owned()).or_default().extend(table);
    }

    /// Adds another job's output to this one. Notes are not merged.
    pub fn merge(&mut self, other: Output) {
        for (name, table) in other.tables {
            self.table(&name, table);
        }
        for (name, add) in other.counts {
            self.count(&name, add);
        }
    }
}

impl Draft {
    /// Begins a computation. It marks the folder as in use, so that `gc` leaves it alone.
    pub async fn begin(folder: Location, again: bool) -> Result<Self> {
        folder.join("begun").put("").await?;
        Ok(Self { folder, again })
    }

    /// Runs a job unless an earlier attempt finished it. The job's name has to contain everything that its
    /// output depends on beyond the stage's key.
    pub async fn job(&self, name: &str, work: impl Future<Output = Result<Output>>) -> Result<Output> {
        if let Some(done) = self.done(name).await? {
            return Ok(done);
        }
        let output = work.await?;
        self.folder.join(&format!("jobs/{name}.json")).put(sealed::seal(&output)).await?;
        Ok(output)
    }

    /// The output that an earlier attempt's job recorded, if its files still have the recorded digests. A
    /// disk may have lost the bytes that were written last although the file's size is right.
    pub async fn done(&self, name: &str) -> Result<Option<Output>> {
        if self.again {
            return Ok(None);
        }
        let Some(bytes) = self.folder.join(&format!("jobs/{name}.json")).get().await? else {
            return Ok(None);
        };
        let Ok(output) = sealed::open::<Output>(&bytes) else { return Ok(None) };
        for file in output.tables.values().flat_map(|table| &table.files) {
            if !file.is_sound(&self.folder).await? {
                return Ok(None);
            }
        }
        Ok(Some(output))
    }
}

impl File {
    /// Whether the file exists and has the right digest.
    pub async fn is_sound(&self, folder: &Location) -> Result<bool> {
        match folder.join(&self.name).digest().await {
            Ok(digest) => Ok(digest == self.blake3),
            Err(Error::Storage { source: object_store::Error::NotFound { .. }, .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// Reads the file and checks its digest; withdraws the output if the file is broken or missing.
    ///
    /// # Errors
    /// [`Error::Withdrawn`] if the file is not what its manifest states. Its output no longer exists then.
    pub async fn checked(&self, folder: &Location) -> Result<bytes::Bytes> {
        self.or_withdrawn(folder, self.read(folder).await).await
    }

    /// Checks the file as [`File::checked`] does, for a file that something else reads. The file is never
    /// whole in memory.
    ///
    /// # Errors
    /// [`Error::Withdrawn`] if the file is not what its manifest states.
    pub async fn check(&self, folder: &Location) -> Result<()> {
        let at = folder.join(&self.name);
        let checked = match at.digest().await {
            Ok(digest) if digest != self.blake3 => Err(corrupt(&at)),
            digest => digest.map(|_| ()),
        };
        self.or_withdrawn(folder, checked).await
    }

    async fn or_withdrawn<T>(&self, folder: &Location, read: Result<T>) -> Result<T> {
        match read {
            // a file that is gone may have been withdrawn by another process just now
            Err(Error::Corrupt { .. })
            | Err(Error::Storage { source: object_store::Error::NotFound { .. }, .. }) => {
                let at = folder.join(&self.name);
                at.delete().await?;
                folder.join("manifest.json").delete().await?;
                Err(Error::Withdrawn { url: at.url() })
            }
            read => read,
        }
    }

    /// Reads the file and checks its digest.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the digest differs.
    pub async fn read(&self, folder: &Location) -> Result<bytes::Bytes> {
        let at = folder.join(&self.name);
        let bytes = at.read().await?;
        if Digest::of(&bytes) != self.blake3 {
            return Err(corrupt(&at));
        }
        Ok(bytes)
    }
}

fn corrupt(at: &Location) -> Error {
    Error::Corrupt { url: at.url(), message: "its bytes are not those its manifest names".into() }
}

/// Reads the manifest of a stage's output; `None` unless it exists and all of its files have their sizes.
pub async fn find(folder: &Location) -> Result<Option<Manifest>> {
    let Some(bytes) = folder.join("manifest.json").get().await? else { return Ok(None) };
    let manifest = match sealed::open::<Manifest>(&bytes) {
        Ok(manifest) => manifest,
        Err(why) => {
            let url = folder.join("manifest.json").url();
            tracing::warn!("{url} is not a manifest: {why}; the stage is computed again");
            return Ok(None);
        }
    };
    let sizes: BTreeMap<_, _> =
        folder.list().await?.into_iter().map(|meta| (meta.location, meta.size)).collect();
    for file in manifest.tables.values().flat_map(|table| &table.files) {
        if sizes.get(&folder.join(&file.name).path) != Some(&file.bytes) {
            tracing::warn!(
                "{} is missing or has another size; the stage is computed again",
                folder.join(&file.name).url()
            );
            return Ok(None);
        }
    }
    Ok(Some(manifest))
}

/// Publishes a finished output by writing its manifest if absent.
///
/// # Errors
/// [`Error::Differs`] if another run has published other rows under the same key.
pub async fn publish(folder: &Location, manifest: &Manifest) -> Result<()> {
    let text = sealed::seal(manifest);
    let at = folder.join("manifest.json");
    if at.put_new(text.clone()).await? {
        return Ok(());
    }
    let there: Option<Manifest> = at.get().await?.and_then(|bytes| sealed::open(&bytes).ok());
    match there {
        Some(there) if there.rows_differ(manifest).is_some() => Err(Error::Differs(format!(
            "stage {} was computed twice from the same inputs and {}: {}",
            manifest.stage,
            there.rows_differ(manifest).unwrap_or_default(),
            at.url()
        ))),
        // the published output lost files, or its manifest cannot be read: this one replaces it
        _ => at.put(text).await,
    }
}

impl Manifest {
    /// The first table whose rows differ from those of `other`, in words.
    pub fn rows_differ(&self, other: &Manifest) -> Option<String> {
        let names = self.tables.keys().chain(other.tables.keys());
        names
            .into_iter()
            .find(|name| {
                let digest = |m: &Manifest| m.tables.get(*name).map(|t| (t.rows, t.digest));
                digest(self) != digest(other)
            })
            .map(|name| format!("its table `{name}` came out with other rows"))
    }
}
