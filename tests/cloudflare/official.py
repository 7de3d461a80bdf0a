#!/usr/bin/env python3
"""Holds the stand-in for Cloudflare's API against the official Python client: the client's own requests are understood,
and its models accept every answer, strictly. Prints `test cloudflare::NAME ... ok` or `FAILED` for each test and ends with
1 when one failed."""

import sys
import traceback
import typing
from pathlib import Path

import cloudflare
import pydantic

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fake

ACCOUNT, ZONE = "a" * 32, "b" * 32


def strictly(model, parsed):
    """The client's models take what they are given; this checks that it was right."""
    pydantic.TypeAdapter(model).validate_python(parsed.to_dict() if hasattr(parsed, "to_dict") else parsed)
    return parsed


def test_access_rules_are_made_listed_changed_and_removed(client):
    from cloudflare.types.firewall import AccessRuleCreateResponse, AccessRuleEditResponse, AccessRuleListResponse
    rules = client.firewall.access_rules
    wanted = [("ip", "192.0.2.1"), ("ip6", "2001:db8::1"), ("ip_range", "192.0.2.0/24"), ("ip_range", "2001:db8::/64")]
    made = [strictly(AccessRuleCreateResponse, rules.create(
        zone_id=ZONE, mode="block", notes="Portcullis:X:r", configuration={"target": target, "value": value}))
        for target, value in wanted]
    assert [rule.configuration.target for rule in made] == [target for target, _ in wanted]
    for n in range(20):
        rules.create(zone_id=ZONE, mode="challenge", configuration={"target": "ip", "value": f"198.51.100.{n}"})
    listed = [strictly(AccessRuleListResponse, rule) for rule in rules.list(zone_id=ZONE, per_page=5)]
    assert len(listed) == 24 and len({rule.id for rule in listed}) == 24, len(listed)
    assert len(list(rules.list(zone_id=ZONE, notes="portcullis:x:"))) == 4, "letter cases are alike"
    found = list(rules.list(zone_id=ZONE, configuration={"target": "ip", "value": "192.0.2.1"}))
    assert [rule.id for rule in found] == [made[0].id]
    assert list(rules.list(account_id=ACCOUNT)) == [], "scopes do not mix"
    edited = strictly(AccessRuleEditResponse, rules.edit(
        made[0].id, zone_id=ZONE, mode="js_challenge", configuration={"target": "ip", "value": "192.0.2.1"}))
    assert edited.mode == "js_challenge"
    assert rules.delete(made[0].id, zone_id=ZONE).id == made[0].id
    refused(cloudflare.NotFoundError, 10001, lambda: rules.delete(made[0].id, zone_id=ZONE))


def test_what_cannot_be_is_refused_with_its_code(client):
    rules = client.firewall.access_rules
    make = lambda target, value: rules.create(
        account_id=ACCOUNT, mode="block", configuration={"target": target, "value": value})
    make("ip", "203.0.113.1")
    refused(cloudflare.BadRequestError, 10009, lambda: make("ip", "203.0.113.1"))
    for target, value in [("ip_range", "203.0.113.0/25"), ("ip_range", "2001:db8::/65"), ("ip", "2001:db8::1")]:
        refused(cloudflare.BadRequestError, 10002, lambda target=target, value=value: make(target, value))
    stranger = cloudflare.Cloudflare(api_token="no", base_url=client.base_url, max_retries=0)
    refused(cloudflare.PermissionDeniedError, 9109, lambda: list(stranger.firewall.access_rules.list(zone_id=ZONE)))
    by_key = cloudflare.Cloudflare(
        api_email="user@example.net", api_key="key", base_url=client.base_url, max_retries=0)
    assert len(list(by_key.firewall.access_rules.list(account_id=ACCOUNT))) == 1


def test_lists_change_by_operations_one_at_a_time(client):
    from cloudflare.types.rules import ListsList
    from cloudflare.types.rules.lists import BulkOperationGetResponse
    from cloudflare.types.rules.lists.item_list_response import ListsListItemIPFull
    lists = client.rules.lists
    made = strictly(ListsList, lists.create(account_id=ACCOUNT, kind="ip", name="bad"))
    assert [found.id for found in lists.list(account_id=ACCOUNT)] == [made.id]
    new = [{"ip": f"192.0.2.{n}", "comment": f"portcullis:x:{n}"} for n in range(25)]
    refused(cloudflare.PermissionDeniedError, 10000, lambda: lists.list(account_id="e" * 32))
    there.control({"settings": {"operation": 0.5}})
    begun = lists.items.create(made.id, account_id=ACCOUNT, body=[*new, {"ip": "2001:DB8::/64"}])
    refused(cloudflare.RateLimitError, 10015,
            lambda: lists.items.create(made.id, account_id=ACCOUNT, body=[{"ip": "192.0.2.99"}]))
    there.control({"settings": {"operation": 0.01}})
    assert finish(client, BulkOperationGetResponse, begun.operation_id) == "completed"
    items = [strictly(ListsListItemIPFull, item) for item in lists.items.list(made.id, account_id=ACCOUNT, per_page=10)]
    assert len(items) == 26 and items[-1].ip == "2001:db8::/64", items[-1]
    gone = lists.items.delete(made.id, account_id=ACCOUNT, items=[{"id": items[0].id}, {"id": items[1].id}])
    finish(client, BulkOperationGetResponse, gone.operation_id)
    assert strictly(ListsList, lists.get(made.id, account_id=ACCOUNT)).num_items == 24
    found = list(lists.items.list(made.id, account_id=ACCOUNT, search="192.0.2.2"))
    assert len(found) == 6, "192.0.2.2 and .20 to .24"
    twice = [{"ip": "192.0.2.200"}, {"ip": "192.0.2.200"}]
    refused(cloudflare.BadRequestError, 10028, lambda: lists.items.create(made.id, account_id=ACCOUNT, body=twice))
    there.control({"settings": {"items_max": 24}})
    full = lists.items.create(made.id, account_id=ACCOUNT, body=[{"ip": "192.0.2.201"}])
    assert finish(client, BulkOperationGetResponse, full.operation_id) == "failed"


def finish(client, model, operation_id):
    while True:
        operation = client.rules.lists.bulk_operations.get(operation_id, account_id=ACCOUNT)
        state = strictly(model, operation).status
        if state not in ("pending", "running"):
            return state


def test_zones_and_their_custom_rules_are_told(client):
    from cloudflare.types.rulesets.phase_get_response import PhaseGetResponse
    there.control({"zones": {ZONE: ACCOUNT}})
    assert [zone.id for zone in client.zones.list(account={"id": ACCOUNT})] == [ZONE]
    phase = "http_request_firewall_custom"
    refused(cloudflare.NotFoundError, 10003, lambda: client.rulesets.phases.get(phase, zone_id=ZONE))
    rule = {"id": "c" * 32, "version": "1", "last_updated": fake.NOW, "ref": "r", "action": "block", "enabled": True,
            "expression": "(ip.src in $bad)", "description": ""}
    there.control({"entry_points": {f"zones/{ZONE}": [rule]}})
    ruleset = strictly(PhaseGetResponse, client.rulesets.phases.get(phase, zone_id=ZONE))
    assert ruleset.rules[0].expression == "(ip.src in $bad)"


def test_past_the_limit_all_calls_are_refused_for_a_while(client):
    there.control({"settings": {"limit": 5, "window": 1.0}})
    there.calls.clear()
    read = lambda: client.with_options(max_retries=0).rules.lists.with_raw_response.list(account_id=ACCOUNT)
    headers = [read().headers for _ in range(5)]
    assert [h["ratelimit"].split(";")[1] for h in headers] == ["r=4", "r=3", "r=2", "r=1", "r=0"], headers
    for _ in range(2):
        error = refused(cloudflare.RateLimitError, 10000, read)
        assert int(error.response.headers["retry-after"]) >= 1
    # The client itself waits as long as it is told.
    assert client.with_options(max_retries=3).rules.lists.list(account_id=ACCOUNT) is not None
    assert there.stats["over"] == 1


def refused(kind, code, call):
    try:
        call()
    except kind as error:
        assert error.errors[0].code == code, error.errors
        return error
    raise AssertionError(f"not refused: {code}")


port, there = fake.start()
there.control({"accounts": [ACCOUNT]})


def main() -> int:
    failed = 0
    official = cloudflare.Cloudflare(api_token="token", base_url=f"http://127.0.0.1:{port}", max_retries=0)
    for name, test in list(globals().items()):
        if not name.startswith("test_") or not isinstance(test, typing.Callable):
            continue
        try:
            test(official)
            print(f"test cloudflare::{name[5:]} ... ok", flush=True)
        except Exception:
            traceback.print_exc()
            failed += 1
            print(f"test cloudflare::{name[5:]} ... FAILED", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
