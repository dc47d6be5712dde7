//! How processes end: an init after its execs, and what is published about it in which order.

use std::sync::{Arc, PoisonError};

use containerd_shim_protos::events::task as events;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Container;
use crate::task::cgroup::OomWatch;
use crate::task::events::timestamp;
use crate::task::process::Process;
use crate::task::reaper::{Adoption, Exit};

/// Which processes of a container are alive.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// The init was reaped; no exec may start any more. Its end is published when no exec runs any more.
    init_ended: bool,
    /// Execs that start or run.
    execs: usize,
}

/// The task that publishes when memory runs out.
#[derive(Debug)]
pub(super) struct OomTask {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Container {
    /// Publishes the end of the init when it comes, after the ends of all its execs.
    pub fn watch_init(self: &Arc<Self>, adoption: &Adoption) {
        // One that is to be restored is watched when it is there.
        if self.init.pid() == 0 {
            return;
        }
        self.watch_oom();
        let ended = adoption.watch(self.init.pid());
        let this = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(exit) = ended.await {
                this.init_ended(exit).await;
            }
        });
    }

    async fn init_ended(&self, exit: Exit) {
        self.flow.send_modify(|flow| flow.init_ended = true);
        if self.outlives_init
            && let Err(failure) = self.call(["kill", "--all", &self.id, "9"]).await
        {
            tracing::debug!(
                "nothing killed after the init of {} ended: {}",
                self.id,
                failure.message
            );
        }
        // An error would mean that the sender is gone, and it is here.
        let _ = self.flow.subscribe().wait_for(|flow| flow.execs == 0).await;
        let oom = self
            .oom
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(OomTask { stop, task }) = oom {
            // What killed it is told before its end.
            let _ = stop.send(());
            let _ = task.await;
        }
        self.publish_exit(&self.init, exit).await;
    }

    pub(super) fn watch_exec(
        self: &Arc<Self>,
        process: Arc<Process>,
        ended: oneshot::Receiver<Exit>,
    ) {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(exit) = ended.await {
                this.publish_exit(&process, exit).await;
            }
            this.exec_ended();
        });
    }

    /// Waits for whatever is being done to the process, so that its end comes after the start that is under way.
    async fn publish_exit(&self, process: &Process, exit: Exit) {
        let _operation = process.operation.lock().await;
        process.set_exited(exit);
        self.around.publisher.publish(&events::TaskExit {
            container_id: self.id.clone(),
            id: process.id.clone(),
            pid: exit.pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        });
    }

    /// Counts an exec that is about to start; false when the init has ended.
    pub(super) fn exec_begins(&self) -> bool {
        self.flow.send_if_modified(|flow| {
            if !flow.init_ended {
                flow.execs += 1;
            }
            !flow.init_ended
        })
    }

    pub(super) fn exec_ended(&self) {
        self.flow.send_modify(|flow| flow.execs -= 1);
    }

    fn watch_oom(self: &Arc<Self>) {
        let watch = match self.cgroup().map(|cgroup| OomWatch::new(&cgroup)) {
            Some(Ok(Some(watch))) => watch,
            Some(Ok(None)) | None => return,
            Some(Err(error)) => {
                return tracing::warn!("OOM kills in {} will not be told: {error}", self.id);
            }
        };
        let (stop, mut stopped) = oneshot::channel();
        let this = Arc::clone(self);
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    killed = watch.next() => match killed {
                        Some(()) => this.publish_oom(),
                        None => return,
                    },
                    _ = &mut stopped => break,
                }
            }
            if watch.missed() {
                this.publish_oom();
            }
        });
        *self.oom.lock().unwrap_or_else(PoisonError::into_inner) = Some(OomTask { stop, task });
    }

    fn publish_oom(&self) {
        self.around.publisher.publish(&events::TaskOOM {
            container_id: self.id.clone(),
            ..Default::default()
        });
    }
}
