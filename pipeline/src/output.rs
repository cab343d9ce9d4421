//! How a stage's output is named, published and found again.
//!
//! ```text
//! <output>/stages/<stage>/<key>/      key: hash of everything the output depends on
//!     begun                           written first: `gc` sees by its age whether somebody is at work
//!     *.parquet …                     files, written in any order, by any number of attempts
//!     jobs/<job>.json                 what a finished job wrote; a killed run goes on behind it
//!     manifest.json                   written last, if absent: from now on the output exists
//! ```
//!
//! What has no manifest does not exist. Two runs that compute the same key write the same bytes under the
//! same names, so neither can harm the other; the first to finish publishes.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hash::{Digest, RowDigest};
use crate::storage::Location;
use crate::storage::sealed;
use crate::{Error, Result};

/// Everything a stage's output depends on, by name. Its hash is the stage's key.
pub type Ingredients = BTreeMap<String, Value>;

/// Says what a stage's output is: its files, with digests of bytes and of rows.
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
    /// What was counted: documents, tokens, rejects and more.
    pub counts: BTreeMap<String, u64>,
    /// What later stages and the report want to know and no table says.
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

/// A table, or any set of files that belong together.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Table {
    /// How many rows it has.
    pub rows: u64,
    /// The digest of the rows, whatever their order, over the columns that are content (locations are not).
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

/// A stage's output that exists.
#[derive(Clone, Debug)]
pub struct Published {
    pub manifest: Arc<Manifest>,
    pub folder: Location,
    /// Whether it was there already.
    pub cached: bool,
    pub seconds: f64,
}

impl Published {
    /// The named table; empty where the stage wrote none.
    pub fn table(&self, name: &str) -> Table {
        self.manifest.tables.get(name).cloned().unwrap_or_default()
    }

    pub fn count(&self, name: &str) -> u64 {
        self.manifest.counts.get(name).copied().unwrap_or(0)
    }

    /// The digest a later stage takes as its ingredient.
    pub fn digest(&self, table: &str) -> Value {
        Value::String(self.table(table).digest.to_string())
    }
}

/// The key of a stage: its name, its version and its ingredients.
pub fn key(stage: &str, ingredients: &Ingredients) -> String {
    let text = serde_json::to_string(&(stage, ingredients)).expect("JSON values print");
    Digest::of(text.as_bytes()).short()
}

/// A stage being computed: the folder to write into, and the jobs that are done already.
pub struct Draft {
    pub folder: Location,
    /// Whether finished jobs are done again too (`--from`).
    pub again: bool,
}

/// What a job reports: the tables it added to, what it counted.
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

    /// Adds another job's output to this one; notes are not merged.
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
    /// Begins a computation, and marks the folder as one that is worked in: `gc` leaves it alone.
    pub async fn begin(folder: Location, again: bool) -> Result<Self> {
        folder.join("begun").put("").await?;
        Ok(Self { folder, again })
    }

    /// Runs a job unless an earlier attempt finished it. A job's name holds everything its output depends
    /// on beyond the stage's key.
    pub async fn job(&self, name: &str, work: impl Future<Output = Result<Output>>) -> Result<Output> {
        if let Some(done) = self.done(name).await? {
            return Ok(done);
        }
        let output = work.await?;
        self.folder.join(&format!("jobs/{name}.json")).put(sealed::seal(&output)).await?;
        Ok(output)
    }

    /// What an earlier attempt's job wrote, if it finished and its files still have the digests that it says: a disk may
    /// have lost what was written last, and kept the size.
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
    /// Whether the file is there with the right bytes.
    pub async fn is_sound(&self, folder: &Location) -> Result<bool> {
        match folder.join(&self.name).digest().await {
            Ok(digest) => Ok(digest == self.blake3),
            Err(Error::Storage { source: object_store::Error::NotFound { .. }, .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// Reads the file, for a consumer that can't check what it reads.
    ///
    /// # Errors
    /// [`Error::Withdrawn`] where it is not what its manifest says: the output it is of is none any more.
    pub async fn checked(&self, folder: &Location) -> Result<bytes::Bytes> {
        self.or_withdrawn(folder, self.read(folder).await).await
    }

    /// The same where something else reads it: it is never whole in memory.
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
            // or another one has found the same, and is at just this
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

    /// The file's bytes, checked against its digest.
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

/// Reads the manifest of a stage's key, if the output exists with all of its files in their sizes.
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

/// Publishes a finished output. Where another run was first, both must have computed the same.
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
        // an output that lost files, or a manifest that can't be read: this one takes its place
        _ => at.put(text).await,
    }
}

impl Manifest {
    /// The first table whose rows are not those of `other`, in words.
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
