//! Passing on what only the active detector can answer, and answering what others pass on.
//!
//! Who may ask what was checked by the detector that received the request; between detectors the bus lets nobody else in.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use proto::api::path;
use proto::bus::nats::Connection;
use proto::bus::nats::ask::{ApiAnswer, ApiCall, call_api};
use tokio::sync::watch;
use tower::ServiceExt;

use super::{BODY_MAX, Refused};
use crate::cluster::ApiHandler;

/// Largest answer that is passed on, in bytes: an `unban --all` names every target.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// What only the active detector can do.
const ACTIVE_ONLY: [&str; 6] = [path::BAN, path::UNBAN, path::ALLOW, path::PAUSE, path::RESUME, path::EXPLAIN];

/// Where requests are passed on to while this detector is not the active one.
#[derive(Clone, Debug)]
pub struct Forward {
    /// The bus.
    pub connection: Connection,
    /// Whether this detector is the active one.
    pub active: watch::Receiver<bool>,
}

/// `router`, of which a standby passes on what it cannot do itself.
pub fn forwarding(router: Router, forward: Forward) -> Router {
    router.layer(middleware::from_fn_with_state(forward, pass_on))
}

async fn pass_on(State(forward): State<Forward>, request: Request, next: Next) -> Response {
    let is_active = *forward.active.borrow();
    if is_active || !ACTIVE_ONLY.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let method = request.method().to_string();
    let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    let body = match to_bytes(request.into_body(), BODY_MAX).await {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => return Refused(StatusCode::PAYLOAD_TOO_LARGE, "the request is too large".to_owned()).into_response(),
    };
    match call_api(&forward.connection, &ApiCall { method, path, body }).await {
        Ok(answer) => respond(answer),
        Err(error) => {
            let text = format!("this detector stands by and no other one answers, try again in a moment: {error}");
            Refused(StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

fn respond(answer: ApiAnswer) -> Response {
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
    (status, [(header::CONTENT_TYPE, "application/json")], answer.body).into_response()
}

/// Answers by `router` what other detectors pass on.
pub fn handler(router: Router) -> ApiHandler {
    Arc::new(move |call| {
        let router = router.clone();
        Box::pin(async move { handle(router, call).await })
    })
}

async fn handle(router: Router, call: ApiCall) -> ApiAnswer {
    let refused = |text: &str| ApiAnswer { status: 400, body: serde_json::json!({ "error": text }).to_string() };
    if !ACTIVE_ONLY.iter().any(|path| call.path.split('?').next() == Some(*path)) {
        return refused("this is not passed on");
    }
    let request = Request::builder().method(call.method.as_str()).uri(&call.path);
    let request = request.header(header::CONTENT_TYPE, "application/json").body(Body::from(call.body));
    let Ok(request) = request else { return refused("no such request") };
    let response = match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let status = response.status().as_u16();
    match to_bytes(response.into_body(), ANSWER_BYTES_MAX).await {
        Ok(bytes) => ApiAnswer { status, body: String::from_utf8_lossy(&bytes).into_owned() },
        Err(_) => ApiAnswer { status: 500, body: r#"{"error":"the answer is too large"}"#.to_owned() },
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};

    use super::*;

    #[tokio::test]
    async fn only_what_needs_the_active_detector_is_answered_for_others() {
        let router = Router::new()
            .route(path::BAN, post(|body: String| async move { (StatusCode::CONFLICT, body) }))
            .route(path::BANS, get(|| async { "all" }));
        let handler = handler(router);
        let call = |method: &str, path: &str| {
            handler(ApiCall { method: method.to_owned(), path: path.to_owned(), body: "{}".to_owned() })
        };
        let answer = call("POST", path::BAN).await;
        assert_eq!((answer.status, answer.body.as_str()), (409, "{}"));
        assert_eq!(call("GET", path::BANS).await.status, 400);
        assert_eq!(call("GET", "/v1/ban/../bans").await.status, 400);
    }
}
