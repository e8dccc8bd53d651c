"""OpenAI's APIs as we speak them: Images, Files and Batches; the routes are in `service/routes`."""
