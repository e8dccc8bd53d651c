"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "imagemill",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
"""No example is judged by the clock. Fixtures that last for all examples of a test are meant so."""

settings.load_profile("imagemill")
