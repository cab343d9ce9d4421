//! Turns a conf's sources into what the reader takes: their files, in units of work.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use object_store::path::Path;
use serde_json::{Value, json};

use crate::conf;
use crate::hash::{doc_id, unit_hash};
use crate::run::Run;
use crate::source::{self, Reader, Spec, Unit, Unread, Why};
use crate::storage::Location;
use crate::tasks::tokenize::spec;
use crate::{Error, Result};

/// A source with its files as they were listed.
pub struct Source {
    /// The source's conf with an absolute URL, which does not depend on where a process runs.
    pub conf: conf::Source,
    pub spec: Arc<Spec>,
    pub units: Vec<Unit>,
    /// Files at the URL that look like data, but that no source of the conf reads.
    pub unread: Vec<Unread>,
    pub reader: Reader,
    /// How rows are read. It is part of the key of everything that is made of them.
    reading: Value,
}

impl Source {
    /// Identifies the rows of a unit without reading them: by how they are read, and by the files' sizes and
    /// versions in the store.
    pub fn unit_identity(&self, unit: &Unit) -> Value {
        let files: Vec<Value> = unit.files.iter().map(|f| json!([f.url, f.size, f.version])).collect();
        json!({ "reading": self.reading, "files": files })
    }

    /// Identifies all rows of the source.
    pub fn identity(&self) -> Value {
        Value::Array(self.units.iter().map(|unit| self.unit_identity(unit)).collect())
    }
}

/// The paths under which a listing of `source` may find `output`: its own and, on a local disk, one through
/// links.
fn names_of(output: &Location, source: &Location) -> Vec<Path> {
    let real_name = || {
        let on_disk = |at: &Location| std::path::Path::new("/").join(at.path.as_ref());
        let source = on_disk(source);
        let folder = source.ancestors().find(|folder| folder.is_dir())?;
        let below = on_disk(output).canonicalize().ok()?;
        let below = below.strip_prefix(folder.canonicalize().ok()?).ok()?.to_owned();
        Path::parse(folder.join(below).to_str()?.trim_matches('/')).ok()
    };
    let real = if output.url().starts_with('/') { real_name() } else { None };
    [output.path.clone()].into_iter().chain(real).collect()
}

/// Lists the files of every source of the conf.
pub async fn list(run: &Run) -> Result<Vec<Source>> {
    let (mut sources, mut unread) = (vec![], vec![]);
    for (i, conf) in run.conf.source.iter().enumerate() {
        let spec = spec(conf).map_err(|e| {
            run.conf.wrong(&["source", &i.to_string(), "domain"], e.to_string(), "here", None)
        })?;
        let wrong = |error| run.conf.names_wrong(&["source", &i.to_string(), "url"], error);
        let at = run.stores.open(&conf.url).map_err(wrong)?;
        // outputs of earlier runs are not sources of this one
        let outputs = run.outputs.iter().filter(|output| at.store_url() == output.store_url());
        let own: Vec<Path> = outputs.flat_map(|output| names_of(output, &at)).collect();
        let listed = source::list(at.store.as_ref(), &at.path, &at.url(), spec.format, &own).await;
        let listed = listed.map_err(wrong)?;
        let reading = json!({
            "origin": conf.name,
            "format": conf.format,
            "text": conf.text,
            "domain": conf.domain,
            "max_document_bytes": conf.max_document_bytes,
        });
        let units = source::units(listed.files);
        unread.push(listed.unread);
        let url = at.url();
        sources.push(Source {
            conf: conf::Source { url, ..conf.clone() },
            spec: Arc::new(spec),
            units,
            unread: vec![],
            reader: run.executor.here.reader(at),
            reading,
        });
    }
    // a folder may have files of two formats and a source for each: what one leaves out, the other may read
    let files = sources.iter().flat_map(|source| &source.units).flat_map(|unit| &unit.files);
    let read: HashSet<&str> = files.map(|file| file.url.as_str()).collect();
    for unread in &mut unread {
        unread.retain(|(_, url): &(Why, String)| !read.contains(url.as_str()));
    }
    for (source, unread) in sources.iter_mut().zip(unread) {
        source.unread = Unread::all(&unread);
    }
    Ok(sources)
}

/// Texts of a sample of the documents, at least `bytes` of text if there are that many. The documents with
/// the smallest hashes are taken, so that the order of files and rows does not matter.
///
/// # Errors
/// The sources have no document.
pub async fn sample(run: &Run, sources: &[Source], bytes: u64) -> Result<Vec<String>> {
    let mut kept: BTreeMap<(u64, [u8; 16]), String> = BTreeMap::new();
    let mut kept_bytes = 0;
    let (mut rejects, mut first_reject) = (0u64, None);
    let bar = run.progress.stage("tokenizer", sources.iter().flat_map(|s| &s.units).map(Unit::bytes).sum());
    for source in sources {
        for unit in &source.units {
            let mut parts = source.reader.parts(unit.clone(), source.spec.clone(), |_| false);
            while let Some(part) = parts.next().await? {
                let spec = &source.spec;
                part.rows(spec, &mut |row| {
                    let document = match &row.outcome {
                        Ok(Some(document)) => document,
                        Ok(None) => return Ok(()),
                        Err(reject) => {
                            rejects += 1;
                            first_reject.get_or_insert_with(|| row.rejected(reject));
                            return Ok(());
                        }
                    };
                    let id = doc_id(document.domain, document.text);
                    let place = (unit_hash("sample", run.conf.run.seed, &id, 0, 0), id);
                    if kept_bytes >= bytes && kept.last_key_value().is_some_and(|(last, _)| place > *last) {
                        return Ok(());
                    }
                    if kept.insert(place, document.text.to_owned()).is_none() {
                        kept_bytes += document.text.len() as u64;
                    }
                    while let Some((_, last)) = kept.last_key_value()
                        && kept_bytes - last.len() as u64 >= bytes
                    {
                        kept_bytes -= last.len() as u64;
                        kept.pop_last();
                    }
                    Ok(())
                })?;
                bar.add(0, 0, 0, part.bytes());
            }
            bar.add(unit.bytes(), 0, 0, 0);
        }
    }
    if kept.is_empty() {
        let message = "the sources have no document to train a tokenizer on".to_owned();
        let Some(first) = first_reject else {
            return Err(Error::data(
                message,
                "all texts are empty: do the sources' urls name the right files?",
            ));
        };
        return Err(Error::data(
            format!("{message}: {rejects} rows were rejected\n  the first: {first}"),
            "compare the source's `text` and `domain` with a line of the file",
        ));
    }
    Ok(kept.into_values().collect())
}
