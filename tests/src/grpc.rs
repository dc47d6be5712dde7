//! Unary gRPC calls over containerd's socket: its own services, and the Container Runtime Interface.

use std::path::Path;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

/// Longest that a call may take: a hundred creations at once take the stock shim more than half a minute on two CPUs.
const LIMIT: Duration = Duration::from_secs(120);

/// Calls a method by its full name, e.g. `runtime.v1.RuntimeService/RunPodSandbox`, with metadata. An error is gRPC's code and message.
pub fn call<A: Message + Default>(
    socket: &Path,
    method: &str,
    metadata: &[(&str, &str)],
    request: &impl Message,
) -> Result<A, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| e.to_string())?;
    let answer = async {
        let exchange = exchange(socket, method, metadata, request.encode_to_vec());
        let answer = tokio::time::timeout(LIMIT, exchange)
            .await
            .map_err(|_| format!("{method}: no answer within {LIMIT:?}"))?;
        answer.map_err(|error| format!("{method}: {error}"))
    };
    let bytes = runtime.block_on(answer)?;
    A::decode(bytes).map_err(|e| format!("{method}: {e}"))
}

async fn exchange(
    socket: &Path,
    method: &str,
    metadata: &[(&str, &str)],
    message: Vec<u8>,
) -> Result<Bytes, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .map_err(|e| text(&e))?;
    let (client, connection) = h2::client::handshake(stream).await.map_err(|e| text(&e))?;
    let connection = tokio::spawn(connection);
    let mut request = http::Request::post(format!("http://localhost/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in metadata {
        request = request.header(*name, *value);
    }
    let request = request.body(()).map_err(|e| text(&e))?;
    let mut client = client.ready().await.map_err(|e| text(&e))?;
    let (response, mut body) = client.send_request(request, false).map_err(|e| text(&e))?;
    // A gRPC message: not compressed, its length, itself.
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).map_err(|e| text(&e))?);
    frame.put_slice(&message);
    body.send_data(frame.freeze(), true).map_err(|e| text(&e))?;

    let response = response.await.map_err(|e| text(&e))?;
    let (head, mut body) = response.into_parts();
    let mut answer = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|e| text(&e))?;
        body.flow_control()
            .release_capacity(chunk.len())
            .map_err(|e| text(&e))?;
        answer.extend_from_slice(&chunk);
    }
    // An error without an answer has its status in the first headers.
    let trailers = body
        .trailers()
        .await
        .map_err(|e| text(&e))?
        .unwrap_or(head.headers);
    connection.abort();
    let header = |name: &str| {
        trailers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    match header("grpc-status").as_str() {
        "0" if answer.len() >= 5 => Ok(answer.freeze().split_off(5)),
        code => Err(format!("gRPC status {code}: {}", header("grpc-message"))),
    }
}
