"""What the gateway tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vocabext.serve.gateway.observe import Observation

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        """Make them, all at zero."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("vocabext_gateway_requests", "Requests by arm, path and status", ["arm", "path",
                                "status"], registry=registry)
        self.seconds = Histogram("vocabext_gateway_request_seconds", "Seconds to the last byte", ["arm"],
                                 buckets=_SECONDS, registry=registry)
        self.first_text = Histogram("vocabext_gateway_first_text_seconds", "Seconds to the first character of a "
                                    "stream", ["arm"], buckets=_SECONDS, registry=registry)
        self.characters = Counter("vocabext_gateway_output_characters", "Characters of answers", ["arm"],
                                  registry=registry)
        self.failures = Counter("vocabext_gateway_engine_failures", "Answers that an engine failed to give", ["arm"],
                                registry=registry)
        self.in_flight = Gauge("vocabext_gateway_in_flight", "Requests that are being answered", ["arm"],
                               registry=registry)
        self.gone = Counter("vocabext_gateway_clients_gone", "Clients that went away before the end", ["arm"],
                            registry=registry)
        self.refused = Counter("vocabext_gateway_refused", "Requests that reached no engine, by status", ["status"],
                               registry=registry)
        self.closed = Counter("vocabext_gateway_connections_closed", "Connections that were in the way: a header or "
                              "body came too slowly, an answer was not read, or there were too many", ["why"],
                              registry=registry)
        self.connections = Gauge("vocabext_gateway_connections", "Connections of clients", registry=registry)
        self.body_bytes = Gauge("vocabext_gateway_body_bytes", "Bytes of request bodies in memory, beyond the first 64 "
                                "KiB of each", registry=registry)
        self.mirrored = Counter("vocabext_gateway_mirrored", "Copies of requests sent to the other arm", ["arm"],
                                registry=registry)
        self.mirrors_dropped = Counter("vocabext_gateway_mirrors_dropped", "Copies not sent, because too many are on "
                                       "their way", registry=registry)
        self.expanded_percent = Gauge("vocabext_gateway_expanded_percent", "Share of requests to the expanded arm",
                                      registry=registry)
        self.changes = Counter("vocabext_gateway_policy_changes", "Changes of the policy", ["by"], registry=registry)
        self.healthy = Gauge("vocabext_gateway_engine_healthy", "Whether the engine of an arm answered its last "
                             "health check", ["arm"], registry=registry)
        self.restarts = Counter("vocabext_gateway_engine_restarts", "How often the engine of an arm was started again "
                                "after it had died", ["arm"], registry=registry)

    def saw(self, observation: Observation, *, mirrored: bool = False) -> None:
        """Count an answer."""
        if observation.failed:
            self.failures.labels(observation.arm).inc()
        if observation.counted and not mirrored:
            self.characters.labels(observation.arm).inc(observation.characters)
            if observation.first_text_seconds is not None:
                self.first_text.labels(observation.arm).observe(observation.first_text_seconds)

    def text(self) -> bytes:
        """Return the state of all counters in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
