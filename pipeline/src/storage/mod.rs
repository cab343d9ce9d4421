//! Object storage by URL: local folders, `s3://`, `gs://`, `az://`, all behind one [`Location`].
//!
//! Credentials come from the environment, as the clouds' SDKs take them, and are never written to a file or a
//! log.

pub mod environment;
mod local;
pub mod sealed;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::RetryConfig;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::{Path, PathPart};
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutMode, PutPayload};
use url::Url;

use crate::hash::Digest;
use crate::{Error, Result, secret};
use local::Local;

/// A folder or an object in an object store.
#[derive(Clone, Debug)]
pub struct Location {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
    /// The URL before `path`, such as `s3://bucket/`; `/` for local paths.
    base: String,
}

#[cfg(feature = "train")]
impl From<&Location> for lengthwise_model::Location {
    fn from(at: &Location) -> Self {
        Self { store: at.store.clone(), path: at.path.clone(), base: at.base.clone() }
    }
}

impl Location {
    /// The URL, as a user can paste it; an absolute path if the location is local.
    pub fn url(&self) -> String {
        format!("{}{}", self.base, self.path)
    }

    /// The location at `relative` below this folder. Names are literal: `ü`, `%` and `#` are characters like
    /// any other.
    pub fn join(&self, relative: &str) -> Self {
        let parts = relative.split('/').filter(|part| !part.is_empty());
        // `..` is not a name, so it is escaped
        let named = parts.map(|part| PathPart::parse(part).unwrap_or_else(|_| part.into()));
        Self { path: named.fold(self.path.clone(), Path::join), ..self.clone() }
    }

    /// The folder that this is in.
    pub fn parent(&self) -> Self {
        Self { path: self.path.parent().unwrap_or_default(), ..self.clone() }
    }

    /// The URL of the store itself, under which DataFusion knows it.
    pub fn store_url(&self) -> Url {
        let base = if self.base == "/" { "file:///" } else { &self.base };
        Url::parse(base).expect("built by Stores::open")
    }

    /// The URL that DataFusion's tables use.
    pub fn table_url(&self) -> String {
        let mut url = self.store_url();
        // `#`, `?` and `%` in names have to be escaped
        if let Ok(mut parts) = url.path_segments_mut() {
            parts.clear().extend(self.path.parts().map(|part| part.as_ref().to_owned()));
        }
        url.to_string()
    }

    fn failed(&self, doing: &'static str) -> impl FnOnce(object_store::Error) -> Error + '_ {
        move |source| Error::Storage { doing, url: self.url(), source }
    }

    /// Reads the whole object; `None` if there is none.
    pub async fn get(&self) -> Result<Option<Bytes>> {
        let got = async { self.store.get(&self.path).await?.bytes().await };
        match got.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.failed("read")(source)),
        }
    }

    /// Reads the whole object.
    ///
    /// # Errors
    /// The object does not exist, or the store fails.
    pub async fn read(&self) -> Result<Bytes> {
        self.store
            .get(&self.path)
            .await
            .map_err(self.failed("read"))?
            .bytes()
            .await
            .map_err(self.failed("read"))
    }

    /// The digest of the object. It is streamed, and never whole in memory.
    pub async fn digest(&self) -> Result<Digest> {
        let mut bytes = self.store.get(&self.path).await.map_err(self.failed("read"))?.into_stream();
        let mut hasher = blake3::Hasher::new();
        while let Some(some) = bytes.try_next().await.map_err(self.failed("read"))? {
            hasher.update(&some);
        }
        Ok(Digest(*hasher.finalize().as_bytes()))
    }

    /// Reads a byte range of the object.
    pub async fn read_range(&self, range: std::ops::Range<u64>) -> Result<Bytes> {
        self.store.get_range(&self.path, range).await.map_err(self.failed("read"))
    }

    /// Writes the object, and replaces an old one.
    pub async fn put(&self, bytes: impl Into<PutPayload>) -> Result<()> {
        self.store.put(&self.path, bytes.into()).await.map_err(self.failed("write"))?;
        Ok(())
    }

    /// Writes the object if there is none yet (put-if-absent). Returns whether it did.
    pub async fn put_new(&self, bytes: impl Into<PutPayload>) -> Result<bool> {
        match self.store.put_opts(&self.path, bytes.into(), PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(source) => Err(self.failed("write")(source)),
        }
    }

    /// Lists every object below this folder.
    pub async fn list(&self) -> Result<Vec<ObjectMeta>> {
        let listed = whole(async || self.store.list(Some(&self.path)).try_collect().await).await;
        listed.map_err(self.failed("list"))
    }

    /// Copies the object inside its store. On the local disk this is a hard link if possible.
    pub async fn copy_to(&self, to: &Location) -> Result<()> {
        self.store.copy(&self.path, &to.path).await.map_err(self.failed("copy"))
    }

    /// Whether this object is certainly a copy of `own`, which has not changed since. On the local disk, both
    /// must be links to the same file; in other stores, they must have the same size, and `own` must not be
    /// newer by the store's own clock.
    pub async fn is_copy_of(&self, own: &Location) -> Result<bool> {
        let (Some(copy), Some(own)) = (self.head().await?, own.head().await?) else { return Ok(false) };
        Ok(match self.base.as_str() {
            "/" => copy.e_tag.is_some() && copy.e_tag == own.e_tag,
            _ => copy.size == own.size && copy.last_modified >= own.last_modified,
        })
    }

    /// The object's metadata; `None` if there is no object.
    pub async fn head(&self) -> Result<Option<ObjectMeta>> {
        match self.store.head(&self.path).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.failed("look at")(source)),
        }
    }

    /// Deletes the object, if there is one.
    pub async fn delete(&self) -> Result<()> {
        match self.store.delete(&self.path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.failed("delete")(source)),
        }
    }
}

/// Runs a listing, and repeats it if an answer breaks off. The library does not retry that itself, because it
/// has already handed on a part of the answer.
pub async fn whole<T>(list: impl AsyncFn() -> object_store::Result<T>) -> object_store::Result<T> {
    for pause in [100, 500, 2500] {
        match list().await {
            Err(error) if error.to_string().contains("response body") => {
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            done => return done,
        }
    }
    list().await
}

/// Parses the values of a file of JSON lines.
pub fn json_lines(bytes: &[u8]) -> impl Iterator<Item = serde_json::Result<serde_json::Value>> {
    bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(serde_json::from_slice)
}

/// Opens object stores, each bucket once. Clones share what is open.
#[derive(Clone, Debug)]
pub struct Stores {
    /// Relative paths are relative to this folder.
    root: PathBuf,
    opened: Arc<Mutex<HashMap<String, Arc<dyn ObjectStore>>>>,
}

impl Stores {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), opened: Arc::default() }
    }

    /// Puts `store` in front of every URL of `base` (`s3://bucket/`; `/` for local paths).
    /// Tests wrap a store this way to make it fail.
    pub fn replace(&self, base: &str, store: Arc<dyn ObjectStore>) {
        self.opened.lock().expect("no panic while held").insert(base.to_owned(), store);
    }

    /// The location of a URL, or of a path relative to the root.
    ///
    /// # Errors
    /// The URL contains a password, its scheme is unknown, or the store's settings in the environment are
    /// inconsistent.
    pub fn open(&self, text: &str) -> Result<Location> {
        if secret::in_url(text) {
            let help = "credentials come from the environment, as the cloud's own tools take them";
            return Err(Error::usage("a URL has what looks like a password in it", help));
        }
        let (base, path) = self.split(text)?;
        let mut opened = self.opened.lock().expect("no panic while held");
        if let Some(store) = opened.get(&base) {
            return Ok(Location { store: store.clone(), path, base });
        }
        let url = if base == "/" { "file:///" } else { &base };
        let url = Url::parse(url).map_err(|e| unusable(text, e))?;
        // object_store puts the authority into request addresses without escaping it
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.@:[]$".contains(c);
        if !url.authority().chars().all(is_plain) {
            return Err(unusable(text, "no bucket has such a name"));
        }
        if ["http", "https"].contains(&url.scheme()) {
            return Err(unusable(text, "it is a web page and no storage: download what is there"));
        }
        if ObjectStoreScheme::parse(&url).is_err() {
            return Err(unusable(text, "no such storage is known"));
        }
        let store = store_of(&url)?;
        opened.insert(base.clone(), store.clone());
        Ok(Location { store, path, base })
    }

    /// Splits a URL into the part of the store and the path. Paths are taken as they are written, so that a
    /// glob's `*` and `{` survive.
    fn split(&self, text: &str) -> Result<(String, Path)> {
        let parse = |path: &str| Path::parse(path.trim_matches('/')).map_err(|e| unusable(text, e));
        if let Some(path) = text.strip_prefix("file://") {
            let path = path.strip_prefix("localhost").unwrap_or(path);
            return Ok(("/".into(), parse(path)?));
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
            return Ok((format!("{scheme}://{bucket}/"), parse(path)?));
        }
        let (scheme, rest) = text.split_at(text.find([':', '/']).unwrap_or(text.len()));
        if secret::SCHEMES.contains(&scheme) && (rest.starts_with(':') || rest.starts_with("//")) {
            return Err(unusable(text, format!("write {scheme}:// for storage")));
        }
        let mut absolute = PathBuf::new();
        for part in self.root.join(text).components() {
            match part {
                std::path::Component::ParentDir => drop(absolute.pop()),
                std::path::Component::CurDir => {}
                part => absolute.push(part),
            }
        }
        let absolute = absolute.to_str().ok_or_else(|| unusable(text, "it is not UTF-8"))?;
        Ok(("/".into(), parse(absolute)?))
    }
}

/// How long a failed request is retried, with growing pauses. Storage that throttles or restarts is away for
/// seconds, not minutes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Opens a store with the settings of the environment, as `object_store::parse_url_opts` takes them, but with
/// more retries.
fn store_of(url: &Url) -> Result<Arc<dyn ObjectStore>> {
    let retry = RetryConfig { retry_timeout: PATIENCE, max_retries: 1000, ..RetryConfig::default() };
    macro_rules! build {
        ($builder:ty, $cloud:literal) => {{
            let begun = <$builder>::new().with_url(url.as_str()).with_retry(retry);
            let settings = environment::settings($cloud, |name| name.parse().ok())?;
            let build = |without: Option<&str>| {
                let set = settings.iter().filter(|(name, ..)| Some(name.as_str()) != without);
                set.fold(begun.clone(), |to, (_, key, value)| to.with_config(*key, value)).build()
            };
            // the library's own message is dropped, because it may contain values
            Arc::new(build(None).map_err(|_| {
                let culprits = settings.iter().map(|(name, ..)| name.as_str());
                environment::refused(url.scheme(), culprits.filter(|name| build(Some(name)).is_ok()))
            })?)
        }};
    }
    Ok(match ObjectStoreScheme::parse(url).map_err(|e| unusable(url.as_str(), e))?.0 {
        ObjectStoreScheme::Local => Arc::new(Local::default()),
        ObjectStoreScheme::AmazonS3 => build!(AmazonS3Builder, "AWS_"),
        ObjectStoreScheme::GoogleCloudStorage => build!(GoogleCloudStorageBuilder, "GOOGLE_"),
        ObjectStoreScheme::MicrosoftAzure => build!(MicrosoftAzureBuilder, "AZURE_"),
        _ => Arc::from(object_store::parse_url(url).map_err(|e| unusable(url.as_str(), e))?.0),
    })
}

fn unusable(text: &str, why: impl std::fmt::Display) -> Error {
    Error::usage(
        format!("`{text}` cannot be used as a URL or path: {why}"),
        "write it as `s3://bucket/folder`, `gs://…`, `az://…` or a path",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_path_starts_at_the_root_and_a_url_at_its_bucket() {
        let stores = Stores::new("/data/here");
        assert_eq!(stores.open("out/x").unwrap().url(), "/data/here/out/x");
        assert_eq!(stores.open("../there").unwrap().url(), "/data/there");
        assert_eq!(stores.open("file:///data/out").unwrap().url(), "/data/out");
        assert_eq!(stores.open("memory:///a/b").unwrap().join("c/d").url(), "memory:///a/b/c/d");
    }

    #[test]
    fn a_misspelt_url_is_no_folder() {
        let stores = Stores::new("/data/here");
        for secret in ["s3:/key:secret@bucket/x", "s3//key:secret@bucket", "s3:key:secret@bucket"] {
            let error = stores.open(secret).map(|at| at.url()).unwrap_err().to_string();
            assert!(!error.contains("secret") && error.contains("password"), "{error}");
        }
        for wrong in ["s3//bucket/x", "s3:/bucket/x", "s3:bucket/x", "gs//bucket", "file:/x"] {
            let error = stores.open(wrong).map(|at| at.url()).unwrap_err();
            assert!(error.to_string().contains("://"), "{error}");
        }
        assert_eq!(stores.open("s3/x").unwrap().url(), "/data/here/s3/x");
        assert_eq!(stores.open("a//b").unwrap().url(), "/data/here/a/b");
    }

    #[tokio::test]
    async fn a_copy_over_itself_leaves_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::new(dir.path());
        let (from, to) = (stores.open("from").unwrap(), stores.open("to").unwrap());
        for text in ["one", "another"] {
            from.put(text).await.unwrap();
            for _ in 0..3 {
                from.copy_to(&to).await.unwrap();
                assert_eq!(to.read().await.unwrap(), text);
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[tokio::test]
    async fn an_object_is_created_once() {
        let at = Stores::new("/").open("memory:///bucket/object").unwrap();
        assert!(at.put_new("first").await.unwrap());
        assert!(!at.put_new("second").await.unwrap());
        assert_eq!(at.read().await.unwrap(), "first");
        at.delete().await.unwrap();
        assert_eq!(at.get().await.unwrap(), None);
    }
}
