//! The packed reader: for any bytes of a Parquet file, the sequences are valid input for the trainer, or the
//! file is an error.
#![no_main]

use std::sync::Arc;

use lengthwise_model::Location;
use lengthwise_model::dataset::Dataset;
use libfuzzer_sys::fuzz_target;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

fuzz_target!(init: {
    // libFuzzer's own hook would abort the process even at panics that the reader catches
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
}, |data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        store.put(&Path::from("data/a.parquet"), data.to_vec().into()).await.unwrap();
        let folder = Location { store, path: Path::from("data"), base: String::new() };
        let Ok(mut dataset) = Dataset::open(&folder, 1000).await else { return };
        for place in 0..dataset.sequences.min(4) {
            let Ok(sequence) = dataset.sequence(place).await else { return };
            assert!(sequence.ids.iter().all(|id| (0..1000).contains(id)));
            let mut end = 0;
            for segment in &sequence.segments {
                assert_eq!(segment.range.start, end, "segments tile the sequence");
                end = segment.range.end;
            }
            assert_eq!(end, sequence.ids.len());
        }
    });
});
