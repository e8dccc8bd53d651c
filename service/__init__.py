"""The HTTP service: validates, enqueues, reports and serves images; never imports torch."""
