"""What the frozen blocks at the bottom give for each example, computed once and read afterwards."""

from progscale.cache.cache import PrefixCache
from progscale.cache.feed import EvalFeed, Feed, Repeats
from progscale.cache.ledger import Nodes
from progscale.cache.make import CACHE_FOLDER, check_cache, make_feed, nodes_of
from progscale.cache.room import CacheSettings

__all__ = [
    "CACHE_FOLDER",
    "CacheSettings",
    "EvalFeed",
    "Feed",
    "Nodes",
    "PrefixCache",
    "Repeats",
    "check_cache",
    "make_feed",
    "nodes_of",
]
