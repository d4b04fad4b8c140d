"""Pipeline schedules by simulation: complete, free of deadlock, small, and as short as can be."""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.parallel.pipeline.schedule import (
    RECEIVE_AHEAD,
    SCHEDULES,
    Action,
    Kind,
    actions,
    stage_rank,
)

TRAINING = ("gpipe", "1f1b")
COST = {Kind.FORWARD: 1, Kind.BACKWARD: 2}
SENDS = {Kind.SEND_ACTIVATION: Kind.RECEIVE_ACTIVATION, Kind.SEND_GRADIENT: Kind.RECEIVE_GRADIENT}
NEEDS = {Kind.FORWARD: Kind.RECEIVE_ACTIVATION, Kind.BACKWARD: Kind.RECEIVE_GRADIENT}

pipelines = st.integers(1, 8)
micro_batch_counts = st.integers(1, 20)
names = st.sampled_from(sorted(SCHEDULES))
training = st.sampled_from(TRAINING)

Program = list[Action]
Key = tuple[Kind, int, int]  # of a message: how it is received, by which stage, which micro-batch


class Channels(Enum):
    """What may hold a message up, beside its receive not being posted.

    The runtime has one process group for activations and one for gradients.
    """

    PER_PEER = "messages of one kind between two ranks keep their order"
    BLOCKING = "per peer, and a rank waits at each send until its peer has posted the receive"
    CONNECTING = (
        "per peer, and the first message of a kind between two ranks makes both wait for it"
    )
    PER_GROUP = "all messages of one kind that a rank sends or receives pass one after the other"


@dataclass
class Pending:
    """A send or receive that a rank has started."""

    key: Key
    is_send: bool
    since: float


@dataclass
class Simulation:
    """Ranks that run their programs at a cost of 1 a forward and 2 a backward."""

    programs: list[Program]
    channels: Channels
    clock: list[float] = field(init=False)
    at: list[int] = field(init=False)
    arrived: dict[Key, float] = field(default_factory=dict)
    sent: set[Key] = field(default_factory=set)
    connected: dict[tuple, set[int]] = field(default_factory=lambda: defaultdict(set))
    queues: dict[tuple, deque[Pending]] = field(default_factory=lambda: defaultdict(deque))
    free_at: dict[tuple, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.clock = [0.0] * len(self.programs)
        self.at = [0] * len(self.programs)

    def run(self) -> float:
        """The time the last rank ends. Fails if ranks wait for each other forever."""
        while any([*map(self.advance, range(len(self.programs))), self.deliver()]):
            pass
        left = [program[at:] for program, at in zip(self.programs, self.at, strict=True)]
        stuck = [f"rank {r} at {p[0].kind} {p[0].micro_batch}" for r, p in enumerate(left) if p]
        assert not stuck, "deadlock: " + "; ".join(stuck)
        assert not any(self.queues.values()), "messages nobody sends or receives"
        return max(self.clock)

    def advance(self, rank: int) -> bool:
        began = self.at[rank]
        while self.at[rank] < len(self.programs[rank]) and self.step(rank):
            self.at[rank] += 1
        return self.at[rank] > began

    def step(self, rank: int) -> bool:
        """Take the rank's next action, unless it must wait."""
        kind, stage, m = self.programs[rank][self.at[rank]]
        if kind in COST:
            if self.is_input(kind, stage):
                arrival = self.arrived.get((NEEDS[kind], stage, m))
                if arrival is None:
                    return False
                self.clock[rank] = max(self.clock[rank], arrival)
            self.clock[rank] += COST[kind]
            return True
        is_send = kind in SENDS
        key = (SENDS[kind] if is_send else kind, stage, m)
        if self.channels == Channels.CONNECTING:
            connected = self.connected[key[0], frozenset(self.ends(key))]
            connected.add(rank)
            if len(connected) < 2:
                return False
        if is_send and key in self.sent:  # blocking, and seen before
            arrival = self.arrived.get(key)
            self.clock[rank] = max(self.clock[rank], arrival or 0)
            return arrival is not None
        self.queues[self.queue(rank, key, is_send)].append(Pending(key, is_send, self.clock[rank]))
        if is_send:
            self.sent.add(key)
        return not (is_send and self.channels == Channels.BLOCKING)

    def is_input(self, kind: Kind, stage: int) -> bool:
        return stage > 0 if kind == Kind.FORWARD else stage < len(self.programs) - 1

    def queue(self, rank: int, key: Key, is_send: bool) -> tuple:
        if self.channels == Channels.PER_GROUP:
            return rank, key[0]
        return rank, key[0], is_send, self.peer(key, is_send)

    def peer(self, key: Key, is_send: bool) -> int:
        sender, receiver = self.ends(key)
        return receiver if is_send else sender

    def ends(self, key: Key) -> tuple[int, int]:
        kind, stage, _ = key
        sender = stage - 1 if kind == Kind.RECEIVE_ACTIVATION else stage + 1
        n = len(self.programs)
        return stage_rank(sender, n), stage_rank(stage, n)

    def deliver(self) -> bool:
        """Complete every message that is first in its sender's and in its receiver's queue."""
        delivered = False
        for name, queue in list(self.queues.items()):
            while queue and queue[0].is_send:
                send = queue[0]
                other = self.queue(self.ends(send.key)[1], send.key, False)
                if not self.queues[other] or self.queues[other][0].is_send:
                    break
                receive = self.queues[other][0]
                if self.channels != Channels.PER_GROUP:
                    assert receive.key == send.key, "peers disagree on the order of messages"
                elif receive.key != send.key:
                    break
                done = max(send.since, receive.since, self.free_at[name], self.free_at[other])
                self.arrived[send.key] = self.free_at[name] = self.free_at[other] = done
                queue.popleft()
                self.queues[other].popleft()
                delivered = True
        return delivered


def programs(name: str, pipeline: int, micro_batches: int) -> list[Program]:
    return [actions(name, rank, pipeline, micro_batches) for rank in range(pipeline)]


def computations(program: Program) -> Program:
    return [action for action in program if action.kind in COST]


@given(names, pipelines, micro_batch_counts)
def test_every_rank_computes_every_micro_batch_once_backward_after_forward(
    name: str, pipeline: int, micro_batches: int
):
    for rank, program in enumerate(programs(name, pipeline, micro_batches)):
        done = computations(program)
        forwards = [m for kind, _, m in done if kind == Kind.FORWARD]
        backwards = [m for kind, _, m in done if kind == Kind.BACKWARD]
        assert forwards == list(range(micro_batches))
        assert backwards == ([] if name == "forward_only" else forwards)
        assert all(stage == rank == stage_rank(stage, pipeline) for _, stage, _ in done)
        for m in backwards:
            assert done.index((Kind.FORWARD, rank, m)) < done.index((Kind.BACKWARD, rank, m))


@given(names, pipelines, micro_batch_counts)
def test_messages_match_pairwise_in_the_same_order(name: str, pipeline: int, micro_batches: int):
    ranks = programs(name, pipeline, micro_batches)
    for sender, receiver, send, receive in [
        *((r, r + 1, Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION) for r in range(pipeline - 1)),
        *((r + 1, r, Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT) for r in range(pipeline - 1)),
    ]:
        sent = [m for kind, stage, m in ranks[sender] if kind == send and stage == receiver]
        received = [m for kind, stage, m in ranks[receiver] if kind == receive]
        trained = name != "forward_only" or send == Kind.SEND_ACTIVATION
        assert sent == received == (list(range(micro_batches)) if trained else [])
    allowed = {0: Kind.SEND_GRADIENT, pipeline - 1: Kind.SEND_ACTIVATION}
    for rank, kind in allowed.items():
        assert kind not in {action.kind for action in ranks[rank]}, "a message off the end"


@given(names, pipelines, micro_batch_counts)
def test_messages_stand_next_to_the_computations_they_belong_to(
    name: str, pipeline: int, micro_batches: int
):
    """A send follows at once; a receive is posted early, but not so early that buffers pile up."""
    for rank, program in enumerate(programs(name, pipeline, micro_batches)):
        posted: set[Key] = set()
        for k, action in enumerate(program):
            kind, stage, m = action
            if kind in (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT):
                assert stage == rank
                posted.add((kind, stage, m))
                assert len(posted) <= RECEIVE_AHEAD + 1
            elif kind in COST:
                has_input = rank > 0 if kind == Kind.FORWARD else rank < pipeline - 1
                if has_input:
                    posted.remove((NEEDS[kind], stage, m))
            elif kind == Kind.SEND_ACTIVATION:
                assert program[k - 1] == (Kind.FORWARD, rank, m)
            else:
                assert program[k - 1] == (Kind.BACKWARD, rank, m)
        assert not posted


@pytest.mark.parametrize("channels", [Channels.PER_PEER, Channels.BLOCKING], ids=lambda c: c.name)
@given(names, pipelines, micro_batch_counts)
def test_no_deadlock(channels: Channels, name: str, pipeline: int, micro_batches: int):
    Simulation(programs(name, pipeline, micro_batches), channels).run()


def test_why_init_process_group_gets_no_device_id():
    """With one, NCCL has one stream for a group: receives posted ahead block sends."""
    with pytest.raises(AssertionError, match="deadlock"):
        Simulation(programs("1f1b", 4, 5), Channels.PER_GROUP).run()


def test_why_the_runtime_connects_neighbours_before_the_first_step():
    """NCCL connects two ranks at their first message, and both hosts wait for it."""
    with pytest.raises(AssertionError, match="deadlock"):
        Simulation(programs("1f1b", 2, 2), Channels.CONNECTING).run()


@given(pipelines, micro_batch_counts)
def test_peak_of_micro_batches_in_flight(pipeline: int, micro_batches: int):
    for rank in range(pipeline):
        assert in_flight("gpipe", rank, pipeline, micro_batches) == micro_batches
        expected = min(pipeline - rank, micro_batches)
        assert in_flight("1f1b", rank, pipeline, micro_batches) == expected


def in_flight(name: str, rank: int, pipeline: int, micro_batches: int) -> int:
    peak = held = 0
    for action in computations(actions(name, rank, pipeline, micro_batches)):
        held += 1 if action.kind == Kind.FORWARD else -1
        peak = max(peak, held)
    assert held == 0
    return peak


@given(training, pipelines, micro_batch_counts)
def test_a_step_takes_the_least_time_there_is(name: str, pipeline: int, micro_batches: int):
    """The last rank waits pipeline-1 forwards; rank 0 ends pipeline-1 backwards after it."""
    took = Simulation(programs(name, pipeline, micro_batches), Channels.PER_PEER).run()
    assert took == (micro_batches + pipeline - 1) * 3


@given(pipelines, micro_batch_counts)
def test_evaluation_takes_the_least_time_there_is(pipeline: int, micro_batches: int):
    took = Simulation(programs("forward_only", pipeline, micro_batches), Channels.PER_PEER).run()
    assert took == micro_batches + pipeline - 1


def torch_order(name: str, pipeline: int, micro_batches: int) -> list[list[tuple[str, int]]]:
    """What each rank computes, in order, under torch.distributed.pipelining."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    theirs = {"1f1b": schedules.Schedule1F1B, "gpipe": schedules.ScheduleGPipe}[name]
    if not hasattr(theirs, "_get_pipeline_order"):
        pytest.skip("this torch does not tell the order of its schedules")
    schedule = object.__new__(theirs)  # its constructor wants a stage on a process group
    schedule._num_stages, schedule._n_microbatches = pipeline, micro_batches
    order = schedule._get_pipeline_order()
    letters = {"F": "forward", "B": "backward"}
    return [
        [
            (letters[action.computation_type.value], action.microbatch_index)
            for action in order[rank]
            if action is not None and action.computation_type.value in letters
        ]
        for rank in range(pipeline)
    ]


@given(training, pipelines, st.integers(0, 12))
@settings(max_examples=50)
def test_the_order_is_that_of_torch(name: str, pipeline: int, more: int):
    """So the bubble is no larger. Torch lists 1F1B for at least as many micro-batches as stages."""
    micro_batches = pipeline + more
    theirs = torch_order(name, pipeline, micro_batches)
    if name == "1f1b":  # torch 2.13's list counts the last rank's forwards from 1
        theirs[-1] = [(kind, m - (kind == "forward")) for kind, m in theirs[-1]]
    ours = [
        [(str(kind), m) for kind, _, m in computations(program)]
        for program in programs(name, pipeline, micro_batches)
    ]
    assert ours == theirs


def test_the_simulation_finds_a_deadlock():
    """Else `test_no_deadlock` would say nothing."""
    ranks = programs("1f1b", 2, 4)
    ranks[1].remove((Kind.SEND_GRADIENT, 0, 3))
    with pytest.raises(AssertionError, match="deadlock: rank 0 at backward 3"):
        Simulation(ranks, Channels.PER_PEER).run()


def test_the_simulation_finds_peers_that_disagree_on_order():
    ranks = programs("gpipe", 2, 2)
    first, second = (ranks[1].index((Kind.RECEIVE_ACTIVATION, 1, m)) for m in (0, 1))
    ranks[1][first], ranks[1][second] = ranks[1][second], ranks[1][first]
    with pytest.raises(AssertionError, match="disagree"):
        Simulation(ranks, Channels.PER_PEER).run()
