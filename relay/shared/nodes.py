"""The Redis that a RELAY_LIMITS_URL means: one server, the master that Sentinels name, or the nodes of a cluster.

Connects when it is first asked. What is counted there, and what happens without an answer, is `relay.shared.redis`'s.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from relay.settings.addresses import limits_hosts

if TYPE_CHECKING:
    from redis import Redis
    from redis.cluster import RedisCluster

#: Seconds between two looks at a server's name.
_LOOK = 2.0
#: Clusters that are no longer asked, kept until the questions to them are over: redis-py closes the connections of one
#: that nobody holds, in the middle of an answer.
_LAST = 4


class Nodes(Protocol):
    """Where keys are. Both may be called from any thread."""

    def client(self, key: str) -> Redis:
        """What speaks to the server that has this key. May connect, and raise what redis-py raises."""

    def drop(self) -> None:
        """Use no connection again that is idle now, and look up anew who has which key."""


def behind(url: str, wait: float) -> Nodes:
    """The servers of `url`, one of the forms of RELAY_LIMITS_URL. `wait`: seconds for a connection and for an answer.

    Raises ValueError or TypeError for what redis-py does not understand.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.connection import parse_url
    from redis.retry import Retry
    from redis.sentinel import Sentinel

    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    waits: dict[str, Any] = {"socket_timeout": wait, "socket_connect_timeout": wait}
    once = Retry(NoBackoff(), 0)  # the default tries for seconds
    if kind in ("", "unix"):
        options = {**waits, "retry": once, **parse_url(url.replace("redis+unix://", "unix://"))}
        options.pop("max_connections", None)  # it is asked by so many at a time as its caller lets

        def made() -> Redis:
            return redis.Redis(connection_pool=redis.ConnectionPool(**options))

        pool = made().connection_pool
        pool.connection_class(**pool.connection_kwargs)  # not connected; refuses options that it has not
        host = options.get("host", "")
        return _One(made, "" if _is_address(host) else host)

    hosts, (name, _, database) = limits_hosts(url), parts.path.strip("/").partition("/")
    user = parts.netloc.rpartition("@")[0]
    given = parse_url(f"redis://{user}@host/{database}?{parts.query}")
    del given["host"]
    given.pop("max_connections", None)
    own = {word: given.pop(f"sentinel_{word}", None) for word in ("username", "password")} if kind == "sentinel" else {}
    (redis.SSLConnection if scheme == "rediss" else redis.Connection)(**given)
    tls = (
        {"ssl": True, **{word: given[word] for word in given if word.startswith("ssl_")}} if scheme == "rediss" else {}
    )
    options = {**waits, **given, **tls}
    if kind == "cluster":
        return _Cluster(hosts, options)
    part = wait / len(hosts)  # they are asked one after another
    asked = Sentinel(
        hosts,
        sentinel_kwargs={"socket_timeout": part, "socket_connect_timeout": part, "retry": once, **own, **tls},
    )
    return _One(lambda: asked.master_for(name, **options, retry=once))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _One:
    """One server. Its name, or the Sentinels, are asked for its address at each new connection."""

    def __init__(self, make: Callable[[], Redis], name: str = "") -> None:
        """`name`: looked up now and then, in a thread, in case it has moved while its old server still answers."""
        self._make = make
        self._client = make()
        self._name = name
        self._addresses: set[str] = set()
        self._looking = False
        self._look_at = 0.0

    def client(self, key: str) -> Redis:
        if self._name and not self._looking and time.monotonic() >= self._look_at:
            self._looking = True
            threading.Thread(target=self._look, name="relay-limits-name", daemon=True).start()
        return self._client

    def _look(self) -> None:
        try:
            found = {str(address[4][0]) for address in socket.getaddrinfo(self._name, None)}
            if self._addresses and found != self._addresses:
                # With other connections: those that are in use now would come back to the pool.
                self.drop()
                self._client = self._make()
            self._addresses = found
        except OSError:  # no look-up is no news
            pass
        finally:
            self._look_at = time.monotonic() + _LOOK
            self._looking = False

    def drop(self) -> None:
        self._client.connection_pool.disconnect(inuse_connections=False)


class _Cluster:
    """A cluster's masters. Each question goes to one of them, so that it waits no longer than for one server.

    redis-py would follow MOVED within the question and, when a node does not answer, ask all others in turn.
    """

    def __init__(self, hosts: list[tuple[str, int]], options: dict[str, Any]) -> None:
        self._given = hosts
        self._hosts = deque(hosts)  # who is asked for the map of the cluster; the first is the next
        self._options = options
        self._map: RedisCluster | None = None
        self._failures = 0
        self._dropped: deque[RedisCluster] = deque(maxlen=_LAST)
        self._lock = threading.Lock()

    def client(self, key: str) -> Redis:
        nodes = self._map
        if nodes is None:
            failures = self._failures
            with self._lock:
                if failures != self._failures:  # who has waited while another tried does not try again
                    raise ConnectionError("the map of the cluster could not be had")
                nodes = self._map or self._look()
        return nodes.get_redis_connection(nodes.get_node_from_key(key))

    def drop(self) -> None:
        nodes, self._map = self._map, None
        if nodes is None:
            return
        self._dropped.append(nodes)
        for node in nodes.get_nodes():
            if node.redis_connection is not None:
                node.redis_connection.connection_pool.disconnect(inuse_connections=False)

    def _look(self) -> RedisCluster:
        """Ask one node for the map: the next time it is another's turn."""
        from redis.backoff import NoBackoff
        from redis.cluster import ClusterNode, RedisCluster
        from redis.retry import Retry

        try:
            nodes = RedisCluster(
                startup_nodes=[ClusterNode(*self._hosts[0])], retry=Retry(NoBackoff(), 0), **self._options
            )
        except BaseException:
            self._failures += 1
            self._hosts.rotate(-1)
            raise
        found = [(str(node.host), int(node.port)) for node in nodes.get_nodes()]
        self._hosts = deque(dict.fromkeys([self._hosts[0], *self._given, *found]))
        self._map = nodes
        return nodes
