"""NetworkPolicies as nftables rules of one pod.

Pure: objects in, text out. Knows nothing of processes. As Kubernetes has it: a pod that no policy
selects for a direction is open in it; what one policy allows, no other forbids.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Manifest = dict[str, Any]


class Peer(NamedTuple):
    """What a policy can know of a pod."""

    namespace: str
    labels: dict[str, str]
    address: str


def rules(pod: Peer, policies: Iterable[Manifest], peers: Sequence[Peer]) -> str:
    """Input for `nft -f` in the pod's network namespace; replaces what was there."""
    chosen = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    lines = ["table inet declared {}", "delete table inet declared", "table inet declared {"]
    for kind, hook, side, key in (
        ("Ingress", "input", "saddr", "from"),
        ("Egress", "output", "daddr", "to"),
    ):
        own = [spec for spec in chosen if kind in spec["policyTypes"]]
        lines.append(f" chain {hook} {{ type filter hook {hook} priority 0; policy accept;")
        if own:
            lines += ['  iif "lo" accept' if hook == "input" else '  oif "lo" accept']
            lines += ["  ct state established,related accept"]
            for rule in (rule for spec in own for rule in spec.get(kind.lower(), [])):
                lines += _rule(rule, rule.get(key), side, pod.namespace, peers)
            lines += ["  drop"]
        lines.append(" }")
    return "\n".join([*lines, "}", ""])


def _rule(
    rule: Manifest,
    sources: list[Manifest] | None,
    side: str,
    namespace: str,
    peers: Sequence[Peer],
) -> list[str]:
    where = ""
    if sources is not None:
        found = [p.address for p in peers if any(_is(s, p, namespace) for s in sources)]
        found += [source["ipBlock"]["cidr"] for source in sources if "ipBlock" in source]
        if not found:
            return []
        where = f"ip {side} {{ {', '.join(found)} }} "
    ports = rule.get("ports")
    if ports is None:
        return [f"  {where}accept"]
    return [f"  {where}{p.get('protocol', 'TCP').lower()} dport {p['port']} accept" for p in ports]


def _is(source: Manifest, peer: Peer, namespace: str) -> bool:
    """Whether a `from` or `to` entry means this pod."""
    if "ipBlock" in source:
        return False
    if "namespaceSelector" in source:
        names = {"kubernetes.io/metadata.name": peer.namespace}
        here = selects(source["namespaceSelector"], names)
    else:
        here = peer.namespace == namespace
    return here and selects(source.get("podSelector", {}), peer.labels)


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector does; an empty one selects all."""
    for wanted in selector.get("matchExpressions", []):
        key, operator = wanted["key"], wanted["operator"]
        if operator == "Exists":
            fits = key in labels
        elif operator == "DoesNotExist":
            fits = key not in labels
        else:
            fits = (labels.get(key) in wanted["values"]) == (operator == "In")
        if not fits:
            return False
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
