//! The row reader: for any bytes of a source file, its rows are documents or rejects, or the file is an
//! error. The first byte selects the format.
#![no_main]

use std::sync::Arc;

use lengthwise::source::{Column, DomainRule, Format, Reader, Spec, list, units};
use libfuzzer_sys::fuzz_target;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else { return };
    let (name, format) = [
        ("a.jsonl", Format::Jsonl),
        ("a.jsonl.gz", Format::Jsonl),
        ("a.jsonl.zst", Format::Jsonl),
        ("a.parquet", Format::Parquet),
        ("a.txt", Format::Text),
    ][*kind as usize % 5];
    let spec = Arc::new(Spec {
        origin: "o".into(),
        format,
        text: Column::parse("text").unwrap(),
        domain: match format {
            Format::Text => DomainRule::Const("d".into()),
            _ => DomainRule::Column(Column::parse("meta.set").unwrap()),
        },
        max_document_bytes: 1000,
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let path = Path::from(name);
        store.put(&path, bytes.to_vec().into()).await.unwrap();
        let files = list(store.as_ref(), &path, name, format, &[]).await.unwrap().files;
        let reader = Reader { store, spool: std::env::temp_dir(), stop: Arc::default() };
        for unit in units(files) {
            let mut parts = reader.parts(unit, spec.clone(), |_| false);
            let mut last = 0;
            while let Ok(Some(part)) = parts.next().await {
                let read = part.rows(&spec, &mut |row| {
                    assert!(row.line > last, "lines ascend");
                    last = row.line;
                    if let Ok(Some(document)) = row.outcome {
                        assert!(!document.text.is_empty() && document.text.len() <= 1000);
                        assert!(!document.domain.is_empty());
                    }
                    Ok(())
                });
                if read.is_err() {
                    return;
                }
            }
        }
    });
});
