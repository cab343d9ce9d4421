//! stub
use crate::Result;
use datafusion::{common::ScalarValue, logical_expr::LogicalPlan, prelude::SessionContext};
use std::collections::BTreeMap;
pub struct Recipe(String);
pub struct Bound {
    pub values: BTreeMap<String, ScalarValue>,
    text: String,
}
impl Recipe {
    pub fn parse(_f: &str, t: &str) -> Result<Self> {
        Ok(Self(t.into()))
    }
    pub fn canonical(&self) -> String {
        self.0.clone()
    }
    pub fn bind(
        &self,
        b: &BTreeMap<String, ScalarValue>,
        _g: &BTreeMap<String, ScalarValue>,
    ) -> Result<Bound> {
        Ok(Bound { values: b.clone(), text: self.0.clone() })
    }
}
impl Bound {
    pub async fn plan(&self, c: &SessionContext) -> Result<LogicalPlan> {
        Ok(c.sql(&self.text).await.map_err(|e| crate::engine::query("x", e))?.into_unoptimized_plan())
    }
}
