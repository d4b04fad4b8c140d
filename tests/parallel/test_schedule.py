"""Pipeline schedules by simulation: complete, free of deadlock, small, and as short as can be."""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megallama.parallel.pipeline.schedule import (
    RECEIVE_AHEAD,
    SCHEDULES,
    Action,
    Kind,
    actions,
    group_sizes,
    peak_in_flight,
    stage_rank,
)
from megallama.parallel.pipeline.simulate import bubble, makespan, simulate

COST = {Kind.FORWARD: 1, Kind.BACKWARD: 2}
SENDS = {Kind.SEND_ACTIVATION: Kind.RECEIVE_ACTIVATION, Kind.SEND_GRADIENT: Kind.RECEIVE_GRADIENT}
NEEDS = {Kind.FORWARD: Kind.RECEIVE_ACTIVATION, Kind.BACKWARD: Kind.RECEIVE_GRADIENT}

Program = list[Action]
Key = tuple[Kind, int, int]  # of a message: how it is received, by which stage, which micro-batch


class Case(NamedTuple):
    name: str
    pipeline: int
    micro_batches: int
    virtual_stages: int = 1
    group: int | None = None

    @property
    def stages(self) -> int:
        return self.pipeline * self.virtual_stages

    @property
    def groups(self) -> tuple[int, ...]:
        return group_sizes(self.micro_batches, self.pipeline, self.group)

    def programs(self) -> list[Program]:
        return [
            actions(
                self.name,
                rank,
                self.pipeline,
                self.micro_batches,
                virtual_stages=self.virtual_stages,
                group=self.group,
            )
            for rank in range(self.pipeline)
        ]


@st.composite
def cases(draw: st.DrawFn, *names: str) -> Case:
    name = draw(st.sampled_from(names or sorted(SCHEDULES)))
    pipeline = draw(st.integers(2 if name == "interleaved_1f1b" else 1, 8))
    virtual_stages = 1 if name == "1f1b" or pipeline == 1 else draw(st.integers(1, 4))
    micro_batches = draw(st.integers(1, 20))
    group = draw(st.none() | st.integers(1, micro_batches + 2))
    return Case(name, pipeline, micro_batches, virtual_stages, group)


TRAINING = ("gpipe", "1f1b", "interleaved_1f1b")


class Channels(Enum):
    """What may hold a message up, beside its receive not being posted.

    The runtime has one process group for activations and one for gradients, and two more for those
    that go round, between the last rank and rank 0.
    """

    PER_PEER = "messages of one kind between two ranks keep their order"
    BLOCKING = "per peer, and a rank waits at each send until its peer has posted the receive"
    CONNECTING = (
        "per peer, and the first message of a kind between two ranks makes both wait for it"
    )
    PER_PAIR = "messages of one group between two ranks, both ways, pass one after the other"
    PER_PAIR_OF_KIND = "as PER_PAIR, if what goes round shared its group with the others"
    PER_GROUP = "all messages of one kind that a rank sends or receives pass one after the other"


SHARED = (Channels.PER_GROUP, Channels.PER_PAIR, Channels.PER_PAIR_OF_KIND)
"""Where sends wait in one queue with receives."""


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
    last_stage: int = field(init=False)
    clock: list[float] = field(init=False)
    at: list[int] = field(init=False)
    arrived: dict[Key, float] = field(default_factory=dict)
    sent: set[Key] = field(default_factory=set)
    connected: dict[tuple, set[int]] = field(default_factory=lambda: defaultdict(set))
    queues: dict[tuple, deque[Pending]] = field(default_factory=lambda: defaultdict(deque))
    free_at: dict[tuple, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.last_stage = max(action.stage for program in self.programs for action in program)
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
            if self.has_input(kind, stage):
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

    def has_input(self, kind: Kind, stage: int) -> bool:
        return stage > 0 if kind == Kind.FORWARD else stage < self.last_stage

    def queue(self, rank: int, key: Key, is_send: bool) -> tuple:
        if self.channels == Channels.PER_GROUP:
            return rank, key[0]
        if self.channels == Channels.PER_PAIR_OF_KIND:
            return rank, key[0], self.peer(key, is_send)
        if self.channels == Channels.PER_PAIR:
            return rank, key[0], self.goes_round(key), self.peer(key, is_send)
        return rank, key[0], is_send, self.peer(key, is_send)

    def goes_round(self, key: Key) -> bool:
        return {0, len(self.programs) - 1} == set(self.ends(key)) and self.ends(key)[0] != (
            0 if key[0] == Kind.RECEIVE_ACTIVATION else len(self.programs) - 1
        )

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
                if self.channels not in SHARED:
                    assert receive.key == send.key, "peers disagree on the order of messages"
                elif receive.key != send.key:
                    break
                done = max(send.since, receive.since, self.free_at[name], self.free_at[other])
                self.arrived[send.key] = self.free_at[name] = self.free_at[other] = done
                queue.popleft()
                self.queues[other].popleft()
                delivered = True
        return delivered


def computations(program: Program) -> Program:
    return [action for action in program if action.kind in COST]


@given(cases())
def test_every_stage_computes_every_micro_batch_once_backward_after_forward(case: Case):
    for rank, program in enumerate(case.programs()):
        done = computations(program)
        assert len(done) == len(set(done))
        assert all(rank == stage_rank(stage, case.pipeline) for _, stage, _ in done)
        for stage in range(rank, case.stages, case.pipeline):
            forwards = [m for kind, s, m in done if (kind, s) == (Kind.FORWARD, stage)]
            backwards = [m for kind, s, m in done if (kind, s) == (Kind.BACKWARD, stage)]
            assert forwards == list(range(case.micro_batches))
            assert backwards == ([] if case.name == "forward_only" else forwards)
            for m in backwards:
                forward, backward = Action(Kind.FORWARD, stage, m), Action(Kind.BACKWARD, stage, m)
                assert done.index(forward) < done.index(backward)


@given(cases())
def test_messages_between_two_ranks_are_received_in_the_order_they_are_sent(case: Case):
    """One channel a kind and direction; with two ranks both neighbours are the same one."""
    sent, received = defaultdict(list), defaultdict(list)
    for rank, program in enumerate(case.programs()):
        for kind, stage, m in program:
            if kind in SENDS:
                peer = stage_rank(stage, case.pipeline)
                sent[SENDS[kind], rank, peer].append((stage, m))
            elif kind in NEEDS.values():
                sender = stage - 1 if kind == Kind.RECEIVE_ACTIVATION else stage + 1
                peer = stage_rank(sender, case.pipeline)
                received[kind, peer, rank].append((stage, m))
    assert sent == received
    training = case.name != "forward_only"
    expected = {
        *((Kind.RECEIVE_ACTIVATION, stage) for stage in range(1, case.stages)),
        *((Kind.RECEIVE_GRADIENT, stage) for stage in range(case.stages - 1) if training),
    }
    messages = [(kind, stage, m) for (kind, *_), keys in sent.items() for stage, m in keys]
    every = [(kind, s, m) for kind, s in expected for m in range(case.micro_batches)]
    assert sorted(messages) == sorted(every)


@given(cases())
def test_messages_stand_next_to_the_computations_they_belong_to(case: Case):
    """A send follows at once; a receive is posted early, but not so early that buffers pile up."""
    waits = 2 * max(0, case.groups[0] - case.pipeline)  # between the last rank and rank 0
    for program in case.programs():
        posted: set[Key] = set()
        for k, action in enumerate(program):
            kind, stage, m = action
            if kind in NEEDS.values():
                posted.add((kind, stage, m))
                assert len(posted) <= RECEIVE_AHEAD + waits + 1
            elif kind in COST:
                first = stage == 0 if kind == Kind.FORWARD else stage == case.stages - 1
                if not first:
                    posted.remove((NEEDS[kind], stage, m))
            elif kind == Kind.SEND_ACTIVATION:
                assert program[k - 1] == (Kind.FORWARD, stage - 1, m)
            else:
                assert program[k - 1] == (Kind.BACKWARD, stage + 1, m)
        assert not posted


@pytest.mark.parametrize(
    "channels",
    [Channels.PER_PEER, Channels.BLOCKING, Channels.PER_PAIR],
    ids=lambda c: c.name,
)
@given(cases())
@example(Case("interleaved_1f1b", 4, 16, 2, 2))  # the plain warm-up with groups of 2 never ends
@example(Case("interleaved_1f1b", 8, 20, 4, 8))  # nor that with a last group of 4
@example(Case("interleaved_1f1b", 2, 4, 2, 4))  # nor that with late receives, if sends wait
def test_no_deadlock(channels: Channels, case: Case):
    Simulation(case.programs(), channels).run()


def test_why_init_process_group_gets_no_device_id():
    """With one, NCCL has one stream for a group: receives posted ahead block sends."""
    with pytest.raises(AssertionError, match="deadlock"):
        Simulation(Case("1f1b", 4, 5).programs(), Channels.PER_GROUP).run()


def test_why_messages_that_go_round_have_groups_of_their_own():
    """NCCL has one stream for what two ranks of a group send to each other, both ways."""
    with pytest.raises(AssertionError, match="deadlock"):
        Simulation(Case("interleaved_1f1b", 2, 4, 2).programs(), Channels.PER_PAIR_OF_KIND).run()


def test_why_the_runtime_connects_neighbours_before_the_first_step():
    """NCCL connects two ranks at their first message, and both hosts wait for it."""
    with pytest.raises(AssertionError, match="deadlock"):
        Simulation(Case("1f1b", 2, 2).programs(), Channels.CONNECTING).run()


@given(cases())
def test_peak_in_flight_is_that_of_the_actions(case: Case):
    for rank, program in enumerate(case.programs()):
        peak = held = 0
        for action in computations(program):
            held += 1 if action.kind == Kind.FORWARD else -1
            peak = max(peak, held)
        said = peak_in_flight(
            case.name,
            rank,
            case.pipeline,
            case.micro_batches,
            virtual_stages=case.virtual_stages,
            group=case.group,
        )
        assert said == (0 if case.name == "forward_only" else peak)


@pytest.mark.parametrize(
    ("case", "peaks"),
    [
        (Case("gpipe", 4, 8), [8, 8, 8, 8]),
        (Case("1f1b", 4, 8), [4, 3, 2, 1]),
        (Case("1f1b", 4, 2), [2, 2, 2, 1]),
        # 2(PP-r-1) + (V-1)N + 1
        (Case("interleaved_1f1b", 4, 8, 2), [11, 9, 7, 5]),
        (Case("interleaved_1f1b", 4, 8, 3, 8), [23, 21, 19, 17]),
        (Case("interleaved_1f1b", 4, 6, 2), [12, 11, 9, 7]),  # one group of 6: all 12, at most
        (Case("interleaved_1f1b", 4, 3, 2), [6, 6, 6, 4]),
    ],
)
def test_peaks_of_small_pipelines(case: Case, peaks: list[int]):
    name, pipeline, micro_batches, virtual_stages, group = case
    said = [
        peak_in_flight(
            name, rank, pipeline, micro_batches, virtual_stages=virtual_stages, group=group
        )
        for rank in range(pipeline)
    ]
    assert said == peaks


@given(st.integers(1, 100), st.integers(1, 20), st.none() | st.integers(1, 110))
def test_groups_are_even_and_never_leave_the_ring_unfilled(
    micro_batches: int, pipeline: int, group: int | None
):
    sizes = group_sizes(micro_batches, pipeline, group)
    least = max(group or pipeline, pipeline)
    assert sum(sizes) == micro_batches
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert sizes[-1] >= min(least, micro_batches)
    assert len(sizes) == 1 or (len(sizes) + 1) * least > micro_batches, "as many as can be"


@pytest.mark.parametrize(
    ("micro_batches", "pipeline", "group", "sizes"),
    [
        (8, 4, None, (4, 4)),
        (10, 4, 5, (5, 5)),
        (8, 4, 8, (8,)),
        (11, 4, None, (6, 5)),
        (3, 4, None, (3,)),
        (3, 4, 2, (3,)),
        (8, 4, 2, (4, 4)),
        (8, 4, 20, (8,)),
    ],
)
def test_small_groups(micro_batches: int, pipeline: int, group: int, sizes: tuple[int, ...]):
    assert group_sizes(micro_batches, pipeline, group) == sizes


def test_virtual_stages_take_turns_group_by_group():
    """Rank 0 of 2 with N = 3, as in figure 6 of the Llama 3 paper."""
    (program, _) = Case("forward_only", 2, 6, 2, 3).programs()
    order = [(stage, m) for _, stage, m in computations(program)]
    first, second = (
        [(s, m) for s in (0, 2) for m in (0, 1, 2)],
        [(s, m) for s in (0, 2) for m in (3, 4, 5)],
    )
    assert order == first + second


@pytest.mark.parametrize(
    ("name", "pipeline"), [("1f1b", 4), ("interleaved_1f1b", 1), ("forward_only", 1)]
)
def test_virtual_stages_need_a_schedule_and_a_pipeline(name: str, pipeline: int):
    for ask in (actions, peak_in_flight):
        with pytest.raises(ValueError, match="no order for 2 stages a rank"):
            ask(name, 0, pipeline, 4, virtual_stages=2)


@given(cases())
def test_a_step_takes_the_least_time_there_is(case: Case):
    """The last rank waits pipeline-1 forwards, and rank 0 ends pipeline-1 backwards after it.

    With fewer micro-batches than ranks, one has to pass all stages and the others follow it.
    """
    busy = max(
        case.micro_batches * case.virtual_stages + case.pipeline - 1,
        case.stages + case.micro_batches - 1,
    )
    least = busy * (COST[Kind.FORWARD] if case.name == "forward_only" else sum(COST.values()))
    assert makespan(simulate(case.programs(), cost)) == least
    assert Simulation(case.programs(), Channels.PER_PEER).run() == least, "receives come too late"


def cost(action: Action) -> float:
    return COST[action.kind]


@given(cases())
def test_the_bubble_is_that_of_the_formula(case: Case):
    """(PP-1) / (V·M) of the busy time, whatever N is, once there are enough micro-batches."""
    assume(case.micro_batches >= case.pipeline)
    idle = bubble(simulate(case.programs(), cost))
    formula = (case.pipeline - 1) / (case.virtual_stages * case.micro_batches)
    assert idle / (1 - idle) == pytest.approx(formula, abs=1e-12)


def torch_order(case: Case) -> list[Program]:
    """What each rank computes, in order, under torch.distributed.pipelining."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    make, ask = {
        "gpipe": (schedules.ScheduleGPipe, "_get_pipeline_order"),
        "1f1b": (schedules.Schedule1F1B, "_get_pipeline_order"),
        "interleaved_1f1b": (
            schedules.ScheduleInterleaved1F1B,
            "_calculate_single_rank_operations",
        ),
    }[case.name]
    if not hasattr(make, ask):
        pytest.skip("this torch does not tell the order of its schedules")
    schedule = object.__new__(make)  # its constructor wants stages on a process group
    schedule._num_stages, schedule._n_microbatches = case.stages, case.micro_batches
    schedule.pp_group_size, schedule.n_local_stages = case.pipeline, case.virtual_stages
    schedule.microbatches_per_round = case.micro_batches // torch_rounds(case)
    ranks = range(case.pipeline)
    if ask == "_get_pipeline_order":
        order = schedule._get_pipeline_order()
    else:
        order = {rank: schedule._calculate_single_rank_operations(rank) for rank in ranks}
    kinds = {"F": Kind.FORWARD, "B": Kind.BACKWARD}
    computed = [
        [
            Action(
                kinds[action.computation_type.value], action.stage_index, action.microbatch_index
            )
            for action in order[rank]
            if action is not None and action.computation_type.value in kinds
        ]
        for rank in ranks
    ]
    if case.name == "1f1b":  # torch 2.13's list counts the last rank's forwards from 1
        computed[-1] = [a._replace(micro_batch=k // 2) for k, a in enumerate(computed[-1])]
    return computed


def torch_rounds(case: Case) -> int:
    return max(1, case.micro_batches // case.pipeline)


@given(cases(*TRAINING))
@settings(max_examples=300)
def test_the_bubble_is_never_above_that_of_torch(case: Case):
    """Where N is theirs, so is the order. They refuse 1F1B with fewer micro-batches than ranks,
    interleaved with micro-batches that rounds do not divide, and gpipe with virtual stages.
    """
    assume(case.name != "1f1b" or case.micro_batches >= case.pipeline)
    assume(case.name != "interleaved_1f1b" or case.micro_batches % torch_rounds(case) == 0)
    assume(case.name != "gpipe" or case.virtual_stages == 1)
    ours, theirs = case.programs(), torch_order(case)
    assert bubble(simulate(ours, cost)) <= bubble(simulate(theirs, cost)) + 1e-12
    if case.group is None:
        assert [computations(program) for program in ours] == theirs


def test_the_simulation_finds_a_deadlock():
    """Else `test_no_deadlock` would say nothing."""
    ranks = Case("1f1b", 2, 4).programs()
    ranks[1].remove((Kind.SEND_GRADIENT, 0, 3))
    with pytest.raises(AssertionError, match="deadlock: rank 0 at backward 3"):
        Simulation(ranks, Channels.PER_PEER).run()


def test_the_simulation_finds_peers_that_disagree_on_order():
    ranks = Case("gpipe", 2, 2).programs()
    first, second = (ranks[1].index((Kind.RECEIVE_ACTIVATION, 1, m)) for m in (0, 1))
    ranks[1][first], ranks[1][second] = ranks[1][second], ranks[1][first]
    with pytest.raises(AssertionError, match="disagree"):
        Simulation(ranks, Channels.PER_PEER).run()
