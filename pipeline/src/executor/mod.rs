//! Who performs tasks: this process, or Ballista's executors.

#[cfg(feature = "cluster")]
pub mod ballista;

use crate::Result;
use crate::output::Output;
use crate::progress::Bar;
use crate::tasks::{Task, Worker};

/// Where a run's tasks are performed.
pub struct Executor {
    /// Performs tasks in this process.
    pub here: Worker,
    /// Performs them instead, where the conf names a cluster.
    #[cfg(feature = "cluster")]
    pub cluster: Option<ballista::Cluster>,
}

impl Executor {
    /// How many tasks are under way at a time: as many as have a place to be performed.
    pub fn tasks_at_a_time(&self) -> usize {
        #[cfg(feature = "cluster")]
        if self.cluster.is_some() {
            return ballista::TASKS_AT_A_TIME;
        }
        self.here.engine.partitions
    }

    /// Whether tasks are performed elsewhere: what they need has to be in storage.
    pub fn is_remote(&self) -> bool {
        #[cfg(feature = "cluster")]
        return self.cluster.is_some();
        #[cfg(not(feature = "cluster"))]
        false
    }

    /// Performs a task. `bar` is told how far it is, where that is known here.
    pub async fn perform(&self, task: Task, bar: &Bar) -> Result<Output> {
        #[cfg(feature = "cluster")]
        if let Some(cluster) = &self.cluster {
            return cluster.perform(&task).await;
        }
        task.perform(&self.here, bar).await
    }
}
