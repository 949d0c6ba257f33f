import cProfile, pstats, io, time
from tests.harness import moves
def prof(**kw):
    moves.carry(**kw)
    p=cProfile.Profile(); t=time.time(); p.enable(); moves.carry(**kw); p.disable()
    s=io.StringIO(); pstats.Stats(p,stream=s).sort_stats("cumtime").print_stats(45)
    return time.time()-t, s.getvalue()
