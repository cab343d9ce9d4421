//! stub
pub fn register(_s: &datafusion::prelude::SessionContext) {}
