import pytest, time
from tests.train.runs import *
@pytest.mark.parametrize("o", [(), ("layout.data_shard=2",), ("layout.tensor=2",), ("layout.pipeline=2",), FOUR])
def test_t(o, tmp_path):
    t=time.time()
    assert train(tmp_path/"r", *o)==0
    print(o, time.time()-t, [round(r["step_time_s"],3) for r in step_lines(tmp_path/"r")])
