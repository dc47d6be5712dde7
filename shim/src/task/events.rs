//! Task events on their way to containerd, in the order in which they happened.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task as events;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::{self, Code};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

/// Most events that wait while containerd is away; further ones are dropped.
const QUEUE: usize = 2048;

/// How long one event is tried before it is dropped: containerd may be restarting.
const PATIENCE: Duration = Duration::from_secs(60);

const FIRST_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(5);

/// How long containerd may take to acknowledge one event.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// An event with the names that containerd knows it by.
pub trait Event: Message {
    /// The topic.
    const TOPIC: &'static str;
    /// Name of the message with its package. Written out, because asking the message's descriptor for it would unpack
    /// every descriptor of the package into memory.
    const TYPE: &'static str;
}

macro_rules! topics {
    ($($event:ident $topic:ident)*) => {
        $(impl Event for events::$event {
            const TOPIC: &'static str = topics::$topic;
            const TYPE: &'static str = concat!("containerd.events.", stringify!($event));
        })*
    };
}

topics! {
    TaskCreate TASK_CREATE_EVENT_TOPIC
    TaskStart TASK_START_EVENT_TOPIC
    TaskExit TASK_EXIT_EVENT_TOPIC
    TaskDelete TASK_DELETE_EVENT_TOPIC
    TaskOOM TASK_OOM_EVENT_TOPIC
    TaskExecAdded TASK_EXEC_ADDED_EVENT_TOPIC
    TaskExecStarted TASK_EXEC_STARTED_EVENT_TOPIC
    TaskPaused TASK_PAUSED_EVENT_TOPIC
    TaskResumed TASK_RESUMED_EVENT_TOPIC
    TaskCheckpointed TASK_CHECKPOINTED_EVENT_TOPIC
}

/// Queues events; a task of its own delivers them.
#[derive(Debug)]
pub struct Publisher {
    namespace: String,
    queue: Mutex<Option<mpsc::Sender<Envelope>>>,
}

impl Publisher {
    /// Starts delivering to `address`, a unix socket (with or without `unix://`) that speaks ttrpc; to nobody when it is
    /// empty. Resolve the returned handle after [`Self::close`] to know that the queue is empty.
    pub fn start(namespace: &str, address: &str) -> (Arc<Self>, tokio::task::JoinHandle<()>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let publisher = Self {
            namespace: namespace.to_owned(),
            queue: Mutex::new(Some(sender)),
        };
        let delivery = tokio::spawn(deliver(address.to_owned(), receiver));
        (Arc::new(publisher), delivery)
    }

    /// Queues an event behind the earlier ones. Never waits: when containerd has been away for too long, it is dropped.
    pub fn publish<E: Event>(&self, event: &E) {
        let any = match pack(E::TYPE, event) {
            Ok(any) => any,
            Err(error) => {
                return tracing::error!("cannot encode an event for {}: {error}", E::TOPIC);
            }
        };
        let envelope = Envelope {
            timestamp: timestamp(SystemTime::now()),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(any),
            ..Default::default()
        };
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = queue.as_ref().map(|queue| queue.try_send(envelope)) {
            tracing::error!("an event for {} is dropped: {error}", E::TOPIC);
        }
    }

    /// Takes no more events.
    pub fn close(&self) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

/// A message in the form in which containerd finds its type again: the name with its package, without an URL.
pub fn pack<M: Message>(name: &str, message: &M) -> containerd_shim_protos::protobuf::Result<Any> {
    Ok(Any {
        type_url: name.to_owned(),
        value: message.write_to_bytes()?,
        ..Default::default()
    })
}

/// A point in time as protobuf has it.
pub fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

async fn deliver(address: String, mut queue: mpsc::Receiver<Envelope>) {
    if address.is_empty() {
        while queue.recv().await.is_some() {}
        return;
    }
    let address = if address.contains("://") {
        address
    } else {
        format!("unix://{address}")
    };
    let mut client = None;
    while let Some(envelope) = queue.recv().await {
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        let give_up = Instant::now() + PATIENCE;
        let mut delay = FIRST_DELAY;
        let mut was_connected = client.is_some();
        // The queue stands still meanwhile: a later event must not overtake this one.
        while let Err(error) = forward(&address, &mut client, &request).await {
            client = None;
            if is_refusal(&error) || Instant::now() + delay > give_up {
                tracing::error!("an event for {topic} is lost: {error}");
                break;
            }
            tracing::debug!("an event for {topic} could not be delivered yet: {error}");
            // A connection to a containerd that has been restarted since: the new one is probably there.
            if std::mem::take(&mut was_connected) {
                continue;
            }
            sleep(delay).await;
            delay = (delay * 2).min(MAX_DELAY);
        }
    }
}

/// Whether containerd understood and does not want it, as against being away or not ready yet.
fn is_refusal(error: &ttrpc::Error) -> bool {
    let ttrpc::Error::RpcStatus(status) = error else {
        return false;
    };
    !matches!(
        status.code(),
        Code::UNAVAILABLE | Code::UNIMPLEMENTED | Code::DEADLINE_EXCEEDED
    )
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client {
        Some(connected) => connected,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let answer = timeout(
        ANSWER_LIMIT,
        connected.forward(ttrpc::context::Context::default(), request),
    )
    .await;
    answer
        .map_err(|_| ttrpc::Error::Others(format!("no answer within {ANSWER_LIMIT:?}")))?
        .map(drop)
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use containerd_shim_protos::ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// Takes each event at the second attempt; never one of another namespace.
    struct Reluctant {
        taken: mpsc::UnboundedSender<String>,
        refused: Mutex<Option<String>>,
    }

    #[async_trait]
    impl Events for Reluctant {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap_or_default();
            let event =
                events::TaskExit::parse_from_bytes(&envelope.event.value).expect("a TaskExit");
            let status = |code| Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no")));
            if event.container_id == "bad" {
                return status(Code::INVALID_ARGUMENT);
            }
            let mut refused = self.refused.lock().expect("not poisoned");
            if refused.as_ref() != Some(&event.container_id) {
                *refused = Some(event.container_id);
                return status(Code::UNAVAILABLE);
            }
            self.taken
                .send(event.container_id)
                .expect("the test listens");
            Ok(Empty::new())
        }
    }

    fn exit_of(id: &str) -> events::TaskExit {
        events::TaskExit {
            container_id: id.to_owned(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn events_keep_their_order_while_containerd_is_away_and_refuses() {
        let directory = tempfile::tempdir().expect("a directory");
        let address = directory.path().join("events.sock").display().to_string();
        let (publisher, delivery) = Publisher::start("ns", &address);
        let (taken, mut arrivals) = mpsc::unbounded_channel();
        publisher.publish(&exit_of("a"));
        publisher.publish(&exit_of("bad"));
        publisher.publish(&exit_of("b"));
        // The first attempts find nobody.
        tokio::task::yield_now().await;
        let service = Reluctant {
            taken,
            refused: Mutex::default(),
        };
        let mut server = Server::new()
            .bind(&format!("unix://{address}"))
            .expect("listen")
            .register_service(create_events(Arc::new(service)));
        server.start().await.expect("serve");
        publisher.publish(&exit_of("c"));
        publisher.close();
        publisher.publish(&exit_of("late"));
        timeout(Duration::from_secs(30), delivery)
            .await
            .expect("in time")
            .expect("no panic");
        let mut order = Vec::new();
        while let Ok(id) = arrivals.try_recv() {
            order.push(id);
        }
        assert_eq!(order, ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn without_an_address_events_go_nowhere() {
        let (publisher, delivery) = Publisher::start("ns", "");
        publisher.publish(&exit_of("a"));
        publisher.close();
        timeout(Duration::from_secs(30), delivery)
            .await
            .expect("in time")
            .expect("no panic");
    }
}
