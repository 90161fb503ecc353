# Every image: `docker buildx bake --file docker/docker-bake.hcl --print` shows the plan. `recipe image build` sets the
# variables from docker/images.lock.json, refuses what is not known, and prints its command.

variable "CPU_BASE" { default = "" }  # image@sha256:..., or a local image
variable "TTML_BASE" { default = "" }
variable "COMMIT" { default = "" }    # of this repository
variable "LOCK_SHA256" { default = "" }

variable "OFFLINE" { default = "1" }   # 1: every wheel is in docker/wheelhouse; cpu is built without any network
variable "PIP_CONF" { default = "" }   # with OFFLINE=0: a pip.conf with the index to ask, a secret of the build
variable "CA_BUNDLE" { default = "" }  # PEM file of a private network's certificate authorities, a secret of the build

variable "APT_SNAPSHOT" { default = "" }  # YYYYMMDDTHHMMSSZ
variable "APT_MIRROR" { default = "https://snapshot.ubuntu.com/ubuntu/${APT_SNAPSHOT}" }
variable "GITHUB_MIRROR" { default = "https://github.com" }  # tt-metal and its submodules, SFPI's and OpenMPI's releases
variable "TT_METAL_TAG" { default = "" }
variable "TT_METAL_COMMIT" { default = "" }
variable "SFPI_VERSION" { default = "" }
variable "SFPI_SHA256" { default = "" }
variable "OPENMPI_VERSION" { default = "" }
variable "OPENMPI_SHA256" { default = "" }

# Every file of a layer has this time: the first that a zip file, and so a wheel, can hold. Not the commit's: a layer
# changes with its content alone.
variable "SOURCE_DATE_EPOCH" { default = "315532800" }

group "default" {
  targets = ["cpu"]
}

target "_common" {
  context    = "."
  dockerfile = "docker/Dockerfile"
  secret = concat(
    PIP_CONF == "" ? [] : ["id=pip_conf,src=${PIP_CONF}"],
    CA_BUNDLE == "" ? [] : ["id=ca,src=${CA_BUNDLE}"],
  )
  args = {
    SOURCE_DATE_EPOCH = SOURCE_DATE_EPOCH
    PIP_NO_INDEX      = OFFLINE == "1" ? "1" : ""
  }
  labels = {
    "org.opencontainers.image.title"    = "Training recipes for Tenstorrent hardware"
    "org.opencontainers.image.licenses" = "Apache-2.0"
    "org.opencontainers.image.revision" = COMMIT
    "recipes.lock"                      = LOCK_SHA256
  }
}

target "cpu" {
  inherits = ["_common"]
  target   = "cpu"
  network  = OFFLINE == "1" ? "none" : "default"  # buildx 0.13 does not know this key; pip asks for nothing anyway
  args     = { CPU_BASE = CPU_BASE }
  labels   = { "recipes.board" = "cpu" }
  tags     = ["recipes-cpu:local"]
}

target "_ttml" {
  inherits = ["_common"]
  args = {
    TTML_BASE       = TTML_BASE
    APT_MIRROR      = APT_MIRROR
    GITHUB_MIRROR   = GITHUB_MIRROR
    OWN_CA          = CA_BUNDLE == "" ? "" : "1"
    TT_METAL_TAG    = TT_METAL_TAG
    TT_METAL_COMMIT = TT_METAL_COMMIT
    SFPI_VERSION    = SFPI_VERSION
    SFPI_SHA256     = SFPI_SHA256
    OPENMPI_VERSION = OPENMPI_VERSION
    OPENMPI_SHA256  = OPENMPI_SHA256
  }
}

target "ttml-builder" {
  inherits = ["_ttml"]
  target   = "ttml-builder"
}

target "runtime-ttml" {
  inherits = ["_ttml"]
  target   = "runtime-ttml"
}

# arch and descriptor as common/hardware.yaml has them; a test compares.
target "board" {
  matrix = {
    board = [
      { name = "n150", arch = "wormhole_b0", descriptor = "" },
      { name = "n300", arch = "wormhole_b0", descriptor = "n300_mesh_graph_descriptor" },
      { name = "n300x2", arch = "wormhole_b0", descriptor = "n300x2_1x4" },
      { name = "t3k", arch = "wormhole_b0", descriptor = "t3k_1x8" },
      { name = "p100", arch = "blackhole", descriptor = "" },
      { name = "p150", arch = "blackhole", descriptor = "" },
      { name = "p150x2", arch = "blackhole", descriptor = "p150_x2_mesh_graph_descriptor" },
      { name = "p150x4", arch = "blackhole", descriptor = "p150x4_1x4" },
      { name = "p150x8", arch = "blackhole", descriptor = "p150x8_1x8" },
      { name = "p300c", arch = "blackhole", descriptor = "p300_mesh_graph_descriptor" },
      { name = "qb2", arch = "blackhole", descriptor = "qb2_1x4" },
      { name = "galaxy", arch = "wormhole_b0", descriptor = "galaxy_1x32" },
      { name = "galaxy-bh", arch = "blackhole", descriptor = "galaxy_bh_1x32" },
      { name = "galaxy-cf", arch = "blackhole", descriptor = "galaxy_bh_1x32" },
    ]
  }
  name     = board.name
  inherits = ["_ttml"]
  target   = board.descriptor == "" ? "board" : "board-mesh"
  args = {
    BOARD                 = board.name
    ARCH                  = board.arch
    MESH_GRAPH_DESCRIPTOR = board.descriptor
  }
  labels = { "recipes.board" = board.name }
  tags   = ["recipes-${board.name}:local"]
}
