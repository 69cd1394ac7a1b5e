"""Who gets a place in the queue, by the clock of the test."""

import pytest

from cascade import ItemError
from cascade.engine.admission import SWEEP, Admission
from cascade.engine.tenants import Tenant


def kind(refusal: ItemError | None) -> str | None:
    return None if refusal is None else refusal.kind


@pytest.mark.parametrize("floods", [1, 2, 3, 9])
def test_however_many_flood_a_newcomer_finds_room(floods: int) -> None:
    admission = Admission(queue=100)
    held = dict.fromkeys(range(floods), 0)
    for _ in range(200):
        for tenant in held:
            refusal = admission.enter(Tenant(str(tenant)), 1, 0)
            assert kind(refusal) in (None, "over_queue"), "its own excess; the server still has room"
            held[tenant] += refusal is None
    assert max(held.values()) - min(held.values()) <= 1
    assert admission.enter(Tenant("newcomer"), 100 // (floods + 1) - 1, 0) is None


def test_the_servers_own_bound_and_that_of_a_tenant_alone() -> None:
    admission = Admission(queue=4)
    assert kind(admission.enter(Tenant("a"), 5, 0)) == "overloaded"
    for _ in range(4):
        assert admission.enter(Tenant("a"), 1, 0, alone=True) is None
    assert kind(admission.enter(Tenant("a"), 1, 0, alone=True)) == "overloaded"
    admission.leave(Tenant("a"))
    assert admission.enter(Tenant("b"), 1, 0) is None


def test_queued_images() -> None:
    admission, tenant = Admission(queue=100), Tenant("a", queued=3)
    assert admission.enter(tenant, 2, 0) is None
    assert kind(admission.enter(tenant, 2, 0)) == "over_queue"
    admission.leave(tenant)
    assert admission.enter(tenant, 2, 0) is None


def test_requests_at_a_time() -> None:
    admission, tenant = Admission(queue=100), Tenant("a", concurrency=2)
    assert admission.enter(tenant, 2, 0) is None and admission.enter(tenant, 2, 0) is None
    assert kind(admission.enter(tenant, 1, 0)) == "over_concurrency"
    admission.finish(tenant)
    assert admission.enter(tenant, 1, 0) is None


def test_images_a_second() -> None:
    admission, tenant = Admission(queue=1000), Tenant("a", rate=10)
    assert admission.enter(tenant, 6, 0) is None
    refusal = admission.enter(tenant, 6, 0)
    assert kind(refusal) == "over_rate" and refusal is not None
    assert refusal.retry_after == pytest.approx(0.2), "then there are six again"
    assert kind(admission.enter(tenant, 6, 0.19)) == "over_rate"
    assert admission.enter(tenant, 6, 0.21) is None
    assert admission.images == 12, "a refused request has no place"


def test_a_request_of_more_than_a_second_leaves_a_debt() -> None:
    admission, tenant = Admission(queue=1000), Tenant("a", rate=0.5)
    assert admission.enter(tenant, 5, 0) is None
    refusal = admission.enter(tenant, 1, 0)
    assert refusal is not None and refusal.retry_after == pytest.approx(10)
    assert admission.enter(tenant, 1, 10.01) is None


def test_idle_tenants_are_forgotten_and_debts_are_not() -> None:
    admission, owing = Admission(queue=10**6), Tenant("owing", rate=1)
    admission.enter(owing, 100, 0)
    admission.finish(owing)
    for _ in range(100):
        admission.leave(owing)
    for i in range(10 * SWEEP):
        tenant = Tenant(str(i))
        admission.enter(tenant, 1, 1)
        admission.finish(tenant)
        admission.leave(tenant)
    assert len(admission._uses) <= 2 * SWEEP
    assert kind(admission.enter(owing, 1, 50)) == "over_rate"
