"""OpenAI's APIs: Images, Files and Batches, with their routes."""
