# A server of one model, or any other command of agevlm:
#   docker build -t agevlm .
#   docker run -p 8000:8000 -v "$PWD/demo_output/checkpoint:/model:ro" agevlm
#   docker run --gpus all -v "$PWD:/work" -w /work agevlm eval scenes --model my-age-vlm --data my_scenes --out outputs/scenes
# Its commands are tested in a new virtual environment; the image itself has not been built.
# It has PyTorch with CUDA, about 6 GB. Weights are mounted or come from the Hub, whose cache is /cache.
FROM python:3.11-slim

COPY . /source
RUN pip install --no-cache-dir "/source[serve,app,eval]" && rm -rf /source

RUN useradd --create-home agevlm && mkdir /cache && chown agevlm /cache
USER agevlm
ENV HF_HOME=/cache
VOLUME /cache
EXPOSE 8000

ENTRYPOINT ["agevlm"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
