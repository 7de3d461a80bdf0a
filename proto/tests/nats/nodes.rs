//! Heartbeats.

use std::convert::Infallible;

use proto::bus::memory::Nodes;
use proto::bus::nats::nodes::{self, HEARTBEAT_INTERVAL};
use proto::report::{NodeReport, Problem, Role};
use proto::shutdown::Shutdown;
use proto::time::Timestamp;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::server::Server;
use crate::wait_until;

const ROLES: [Role; 2] = [Role::Detect, Role::Enforce];

/// The roles of one process speak; then what they said is heard; then their heartbeats are sent; and so each second.
#[tokio::test(flavor = "multi_thread")]
async fn a_problem_of_a_role_is_gone_once_the_role_does_not_say_it_any_more() {
    let server = Server::start();
    let (ours, observer) = (server.bus().await, server.connect().await);
    let (own, all, shutdown) = (Nodes::default(), Nodes::default(), Shutdown::new());
    let (trouble, trouble_in) = watch::channel(true);
    let mut tasks = JoinSet::<Result<(), Infallible>>::new();

    let speaking = own.clone();
    tasks.spawn(async move {
        loop {
            for role in ROLES {
                let mut report = NodeReport::new("edge-1", role, Timestamp::EPOCH);
                report.problems.extend(trouble_in.borrow().then(|| Problem::degraded("trouble")));
                speaking.put(report);
            }
            tokio::time::sleep(HEARTBEAT_INTERVAL).await;
        }
    });
    tokio::time::sleep(HEARTBEAT_INTERVAL / 3).await;
    tasks.spawn(nodes::watch(ours.clone(), own.clone(), shutdown.clone()));
    tasks.spawn(nodes::watch(observer, all.clone(), shutdown.clone()));
    tokio::time::sleep(HEARTBEAT_INTERVAL / 3).await;
    for role in ROLES {
        let whose = (role, "edge-1".to_owned());
        tasks.spawn(nodes::beat(ours.clone(), own.clone(), whose, |_| {}, shutdown.clone()));
    }
    let problems = |nodes: &Nodes| nodes.all().iter().map(|report| report.problems.len()).collect::<Vec<_>>();
    wait_until("both have the trouble", || problems(&own) == [1, 1] && problems(&all) == [1, 1]).await;
    trouble.send_replace(false);
    wait_until("the trouble is over", || problems(&own) == [0, 0] && problems(&all) == [0, 0]).await;
    // Ends all of them.
    drop(tasks);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_hangs_does_not_pass_for_well_because_its_process_is() {
    let server = Server::start();
    let (connection, nodes, shutdown) = (server.bus().await, Nodes::default(), Shutdown::new());
    nodes.put(NodeReport::new("edge-1", Role::Enforce, Timestamp::EPOCH));
    let mut tasks = JoinSet::<Result<(), Infallible>>::new();
    let whose = (Role::Enforce, "edge-1".to_owned());
    tasks.spawn(nodes::beat(connection.clone(), nodes.clone(), whose, |_| {}, shutdown));
    let texts = || nodes.all().into_iter().flat_map(|report| report.problems).map(|problem| problem.text);
    wait_until("it is said to hang", || texts().any(|text| text.contains("although its process runs"))).await;
    nodes.put(NodeReport::new("edge-1", Role::Enforce, Timestamp::EPOCH));
    wait_until("it goes on", || texts().next().is_none()).await;
}
