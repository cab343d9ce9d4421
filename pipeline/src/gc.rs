//! gc: finds and removes files that dead runs left behind.
//!
//! ```text
//! <output>/stages/<stage>/<key>/   without a manifest: everything, if its run died
//!                                  with one: files it does not name, such as jobs/, which are no longer read
//! <output>/runs/<run>/             without a manifest: everything, if its run died
//! <output>/tasks/<key>.json        messages to executors
//! ```
//!
//! Files younger than a given age stay, and so does everything in a folder with a younger file, because a run
//! at work marks its folders. Files that a manifest names stay, and so does everything beside or below a
//! nested manifest, such as a checkpoint's. Files that do not belong to this layout are left alone.

use std::collections::{BTreeMap, BTreeSet};

use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt};
use serde::Serialize;

use crate::layout;
use crate::output::Manifest;
use crate::storage::{Location, sealed};
use crate::{Error, Result};

/// An object that nothing refers to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Leftover {
    /// The path relative to the output.
    pub path: String,
    pub bytes: u64,
}

/// Everything in an output that dead runs left before `before`, in seconds since 1970.
///
/// # Errors
/// [`Error::Corrupt`] if the manifest of a stage's output cannot be read; storage errors.
pub async fn leftovers(output: &Location, before: i64) -> Result<Vec<Leftover>> {
    let mut found = vec![];
    for (folder, objects) in folders(output).await? {
        found.extend(of_folder(output, &folder, &objects, before).await?);
    }
    Ok(found)
}

/// Removes what [`leftovers`] finds, one folder after the other. Each folder is listed again just before, and
/// `gone` is called for every object that was removed.
pub async fn collect(output: &Location, before: i64, mut gone: impl FnMut(&Leftover)) -> Result<()> {
    for folder in folders(output).await?.into_keys() {
        let at = output.join(&folder);
        let mut objects = below(output, at.list().await?);
        objects.retain(|(path, _)| layout::folder_of(path).is_some());
        let mut leftovers = of_folder(output, &folder, &objects, before).await?;
        // a job's record goes before its files, because a resumed run would take the job for done
        leftovers.sort_by_key(|leftover| !leftover.path.contains("/jobs/"));
        let was = marks(&at).await?;
        for leftover in leftovers {
            if marks(&at).await?.iter().any(|mark| !was.contains(mark)) {
                // a run has resumed this folder
                break;
            }
            output.join(&leftover.path).delete().await?;
            gone(&leftover);
        }
    }
    Ok(())
}

/// The objects that show that a run works in a folder or has finished it: the attempts, `begun` and
/// `manifest.json`.
async fn marks(folder: &Location) -> Result<Vec<ObjectMeta>> {
    let mut marks = folder.join("attempts").list().await?;
    for name in ["begun", "manifest.json"] {
        let at = folder.join(name);
        match at.store.head(&at.path).await {
            Ok(meta) => marks.push(meta),
            Err(object_store::Error::NotFound { .. }) => {}
            Err(source) => return Err(Error::Storage { doing: "look at", url: at.url(), source }),
        }
    }
    Ok(marks)
}

/// The objects of each folder that `gc` looks at, by path relative to the output.
async fn folders(output: &Location) -> Result<BTreeMap<String, Vec<(String, ObjectMeta)>>> {
    let mut folders: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for (path, meta) in below(output, output.list().await?) {
        if let Some(folder) = layout::folder_of(&path) {
            folders.entry(folder).or_default().push((path, meta));
        }
    }
    Ok(folders)
}

fn below(output: &Location, objects: Vec<ObjectMeta>) -> Vec<(String, ObjectMeta)> {
    let relative = |path: &Path| {
        let parts: Vec<String> =
            path.prefix_match(&output.path)?.map(|part| part.as_ref().to_owned()).collect();
        Some(parts.join("/"))
    };
    objects.into_iter().filter_map(|meta| Some((relative(&meta.location)?, meta))).collect()
}

async fn of_folder(
    output: &Location,
    folder: &str,
    objects: &[(String, ObjectMeta)],
    before: i64,
) -> Result<Vec<Leftover>> {
    let old = |meta: &ObjectMeta| meta.last_modified.timestamp() < before;
    let kind = folder.split('/').next().unwrap_or_default();
    if kind == "tasks" {
        let old = objects.iter().filter(|(_, meta)| old(meta));
        return Ok(old.map(|(path, meta)| Leftover { path: path.clone(), bytes: meta.size }).collect());
    }
    // a run at work has written something recently
    if objects.iter().any(|(_, meta)| !old(meta)) {
        return Ok(vec![]);
    }
    let own = format!("{folder}/manifest.json");
    let mut named = BTreeSet::new();
    if objects.iter().any(|(path, _)| *path == own) {
        if kind == "runs" {
            return Ok(vec![]);
        }
        let at = output.join(&own);
        // a manifest that is gone by now may name anything, so the folder is left alone
        let Some(bytes) = at.get().await? else { return Ok(vec![]) };
        let manifest: Manifest =
            sealed::open(&bytes).map_err(|message| Error::Corrupt { url: at.url(), message })?;
        let files = manifest.tables.into_values().flat_map(|table| table.files);
        named = files.map(|file| format!("{folder}/{}", file.name)).collect();
        named.insert(own.clone());
    }
    // a checkpoint has its own manifest, and everything below its folder belongs to it
    let inner: Vec<&str> = objects
        .iter()
        .filter(|(path, _)| *path != own)
        .filter_map(|(path, _)| path.strip_suffix("manifest.json").filter(|folder| folder.ends_with('/')))
        .collect();
    let kept = |path: &String| named.contains(path) || inner.iter().any(|folder| path.starts_with(folder));
    let left = objects.iter().filter(|(path, _)| !kept(path));
    Ok(left.map(|(path, meta)| Leftover { path: path.clone(), bytes: meta.size }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::{Digest, RowDigest};
    use crate::output::{File, Table};
    use crate::storage::Stores;
    use proptest::prelude::*;

    const DONE: &str = "d0e0d0e0d0e0d0e0d0e0d0e0d0e0d0e0";
    /// Folders in which others keep files beside the output.
    const FOREIGN: [&str; 5] = ["elsewhere/x", "runs/exp1", "stages/a/b", "stages/tokens/b", "tokenizers"];
    const DEAD: &str = "deaddeaddeaddeaddeaddeaddeaddead";

    /// An output with a folder of each kind. `names` are files, with whether the manifest names them.
    async fn output(names: &[(String, bool)]) -> Location {
        let output = Stores::new("/").open("memory:///out").unwrap();
        let file = |name: &String| File { name: name.clone(), bytes: 1, rows: 0, blake3: Digest::of(b"x") };
        let files = names.iter().filter(|(_, named)| *named).map(|(name, _)| file(name)).collect();
        let table = Table { rows: 0, digest: RowDigest(0), files };
        let manifest = Manifest {
            stage: "tokens".into(),
            key: "k".into(),
            ingredients: Default::default(),
            tables: [("t".to_owned(), table)].into(),
            counts: Default::default(),
            notes: Default::default(),
        };
        for (name, _) in names {
            let (done, dead) = (format!("stages/tokens/{DONE}"), format!("stages/tokens/{DEAD}"));
            for folder in
                [&done[..], &dead, "runs/t-d0e0d0e0d0e0", "runs/t-deaddeaddead"].into_iter().chain(FOREIGN)
            {
                output.join(folder).join(name).put("x").await.unwrap();
            }
            output
                .join(&format!("stages/train/{DEAD}/checkpoints/step-5"))
                .join(name)
                .put("x")
                .await
                .unwrap();
        }
        output
            .join(&format!("stages/tokens/{DONE}/manifest.json"))
            .put(sealed::seal(&manifest))
            .await
            .unwrap();
        output
            .join(&format!("stages/train/{DEAD}/checkpoints/step-5/manifest.json"))
            .put("{}")
            .await
            .unwrap();
        output.join(&format!("stages/train/{DEAD}/attempt-1/log")).put("x").await.unwrap();
        output.join("runs/t-d0e0d0e0d0e0/manifest.json").put("{}").await.unwrap();
        output.join("latest/t.json").put("{}").await.unwrap();
        output.join(&format!("tasks/{DEAD}.json")).put("{}").await.unwrap();
        output.join("tasks/todo.json").put("{}").await.unwrap();
        output
    }

    async fn paths(output: &Location) -> BTreeSet<String> {
        below(output, output.list().await.unwrap()).into_iter().map(|(path, _)| path).collect()
    }

    const LATER: i64 = i64::MAX;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_a_manifest_names_stays_and_what_dead_runs_left_goes(
            names in prop::collection::btree_map("(jobs/|a/)?[a-z]{1,8}(\\.json|\\.parquet)", any::<bool>(), 1..8)
        ) {
            let names: Vec<(String, bool)> = names.into_iter().collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let output = output(&names).await;
                let before = paths(&output).await;
                let mut gone = BTreeSet::new();
                collect(&output, LATER, |leftover| { gone.insert(leftover.path.clone()); }).await.unwrap();
                let after = paths(&output).await;
                assert_eq!(before.difference(&after).cloned().collect::<BTreeSet<_>>(), gone);
                for (name, named) in &names {
                    assert_eq!(after.contains(&format!("stages/tokens/{DONE}/{name}")), *named, "{name}");
                    for dead in [format!("stages/tokens/{DEAD}"), "runs/t-deaddeaddead".into()] {
                        assert!(!after.contains(&format!("{dead}/{name}")), "{name}");
                    }
                    let checkpoint = format!("stages/train/{DEAD}/checkpoints/step-5");
                    for kept in [&checkpoint[..], "runs/t-d0e0d0e0d0e0"].into_iter().chain(FOREIGN) {
                        assert!(after.contains(&format!("{kept}/{name}")), "{name}");
                    }
                }
                for dead in [format!("tasks/{DEAD}.json"), format!("stages/train/{DEAD}/attempt-1/log")] {
                    assert!(!after.contains(&dead), "{dead}");
                }
                let done = format!("stages/tokens/{DONE}/manifest.json");
                for kept in ["latest/t.json", &done, "runs/t-d0e0d0e0d0e0/manifest.json", "tasks/todo.json"] {
                    assert!(after.contains(kept), "{kept}");
                }
                assert_eq!(leftovers(&output, LATER).await.unwrap(), []);
            });
        }
    }

    #[tokio::test]
    async fn what_is_young_or_beside_something_young_stays() {
        let output = output(&[("a.json".into(), false), ("b.json".into(), true)]).await;
        let now = jiff::Timestamp::now().as_second();
        assert_eq!(leftovers(&output, now - 60).await.unwrap(), []);
        assert!(!leftovers(&output, now + 60).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_manifest_that_can_not_be_read_ends_it() {
        let output = output(&[("a.json".into(), true)]).await;
        output.join(&format!("stages/tokens/{DONE}/manifest.json")).put("{\"stage\": 1}").await.unwrap();
        let error = leftovers(&output, LATER).await.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    }
}
