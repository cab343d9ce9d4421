//! Performs tasks, in this process or on Ballista's executors.

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
    /// Performs them instead, if the conf names a cluster.
    #[cfg(feature = "cluster")]
    pub cluster: Option<ballista::Cluster>,
}

impl Executor {
    /// How many tasks to give out at a time: in this process as many as the engine has partitions, on a
    /// cluster as many as its scheduler queues.
    pub fn tasks_at_a_time(&self) -> usize {
        #[cfg(feature = "cluster")]
        if self.cluster.is_some() {
            return ballista::TASKS_AT_A_TIME;
        }
        self.here.engine.partitions
    }

    /// Whether tasks are performed by other processes, so that what they need has to be in storage.
    pub fn is_remote(&self) -> bool {
        #[cfg(feature = "cluster")]
        return self.cluster.is_some();
        #[cfg(not(feature = "cluster"))]
        false
    }

    /// Performs a task. Its progress goes to `bar` only if it is performed in this process.
    pub async fn perform(&self, task: Task, bar: &Bar) -> Result<Output> {
        #[cfg(feature = "cluster")]
        if let Some(cluster) = &self.cluster {
            return cluster.perform(&task).await;
        }
        task.perform(&self.here, bar).await
    }
}
