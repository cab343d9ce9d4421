//! The header of a safetensors file: the tensors that it declares lie in the file, or the file is an error.
#![no_main]

use std::sync::Arc;

use lengthwise_model::Location;
use lengthwise_model::tensors::Reader;
use libfuzzer_sys::fuzz_target;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let path = Path::from("model.safetensors");
        store.put(&path, data.to_vec().into()).await.unwrap();
        let Ok(reader) = Reader::open(Location { store, path, base: String::new() }).await else { return };
        for (name, info) in reader.metadata.tensors() {
            let numbers = info.shape.iter().product::<usize>();
            if ["F32", "F16", "BF16"].contains(&info.dtype.to_string().as_str()) {
                assert_eq!(reader.read(&name, 0..numbers).await.expect("it lies in the file").len(), numbers);
            }
            assert!(reader.read(&name, 0..usize::MAX).await.is_err());
        }
    });
});
