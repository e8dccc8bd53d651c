"""The txt2img API of stable-diffusion-webui (A1111), for the many tools that speak it."""
