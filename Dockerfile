# docker build -t export3d . && docker run --rm --network host export3d            the page, on http://127.0.0.1:7860
# docker run --rm -p 127.0.0.1:8080:8080 -e EXPORT3D_TOKEN export3d serve --host 0.0.0.0   the API, with your token
# docker run --rm -v "$PWD:/work" export3d reenact photo.jpg video.mp4 -o out.mp4  any other command
FROM python:3.13-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
COPY . /src
RUN pip install --no-cache-dir "/src[app]" && rm -rf /src && useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["export3d"]
CMD ["app"]
