// The NumPy-facing host module cpr_fast._host. It does not depend on torch, so that importing it is fast.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpr_fast.h"
#include "cpu/common/dispatch.h"
#include "msgpack.h"
#include "philox.h"
#include "resize.h"
#include "yuv_to_rgb.h"

namespace py = pybind11;

namespace {

constexpr auto kDense = py::array::c_style;
constexpr int64_t kMostPixels = 1 << 16;  // of a side

std::string shape_of(const py::array& array) {
  std::string shape;
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis)
    shape += std::string(axis ? ", " : "") + std::to_string(array.shape(axis));
  return "[" + shape + "]";
}

void check_columns(const char* name, const py::array& array, py::ssize_t columns) {
  if (array.ndim() == 2 && array.shape(1) == columns) return;
  throw py::value_error(std::string(name) + ": expected shape [N, " + std::to_string(columns) + "], got " +
                        shape_of(array));
}

py::array_t<uint32_t> philox(uint64_t seed, const py::array_t<uint32_t, kDense>& counters) {
  check_columns("counters", counters, 4);
  const py::ssize_t n = counters.shape(0);
  py::array_t<uint32_t> words({n, py::ssize_t{4}});
  const uint32_t* in = counters.data();
  uint32_t* out = words.mutable_data();
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < n; ++i, in += 4, out += 4) {
    const auto word = cpr::philox4x32(seed, {in[0], in[1], in[2], in[3]});
    for (int j = 0; j < 4; ++j) out[j] = word[j];
  }
  return words;
}

py::array_t<double> philox_uniform(uint64_t seed, const py::array_t<uint64_t, kDense>& streams, int64_t blocks) {
  check_columns("streams", streams, 3);
  if (blocks < 1) throw py::value_error("blocks: expected at least 1, got " + std::to_string(blocks));
  const py::ssize_t n = streams.shape(0);
  const uint64_t* in = streams.data();
  for (py::ssize_t i = 0; i < 3 * n; ++i) {
    if (in[i] >> 32) throw py::value_error("streams: expected values below 2**32, got " + std::to_string(in[i]));
  }
  py::array_t<double> uniforms({n, py::ssize_t{4 * blocks}});
  double* out = uniforms.mutable_data();
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < n; ++i, in += 3) {
    for (int64_t block = 0; block < blocks; ++block) {
      const auto word = cpr::philox4x32(seed, {static_cast<uint32_t>(in[0]), static_cast<uint32_t>(in[1]),
                                               static_cast<uint32_t>(in[2]), static_cast<uint32_t>(block)});
      for (int j = 0; j < 4; ++j) *out++ = word[j] * 0x1p-32;
    }
  }
  return uniforms;
}

py::array_t<uint64_t> msgpack_spans(const py::buffer& record) {
  const py::buffer_info bytes = record.request();
  if (bytes.ndim != 1 || bytes.itemsize != 1 || bytes.strides[0] != 1)
    throw py::value_error("record: expected a contiguous buffer of bytes");
  std::vector<cpr::Span> spans;
  {
    py::gil_scoped_release release;  // a page of the mapped file may have to be read first
    spans = cpr::byte_string_spans(static_cast<const uint8_t*>(bytes.ptr), bytes.size);
  }
  py::array_t<uint64_t> out({static_cast<py::ssize_t>(spans.size()), py::ssize_t{2}});
  std::copy_n(reinterpret_cast<const uint64_t*>(spans.data()), 2 * spans.size(), out.mutable_data());
  return out;
}

// The weights of a resize from one size to another, which any number of calls and threads use.
class Resize {
 public:
  using Size = std::pair<int64_t, int64_t>;

  Resize(Size from, Size to, const std::string& filter)
      : rows_(checked(from, to).first, to.first, filter_of(filter)),
        columns_(from.second, to.second, filter_of(filter)) {}

  void operator()(const py::array_t<uint8_t>& frames, py::array_t<uint8_t>& out) const {
    const auto [height, width, out_height, out_width] = sizes();
    const bool same = frames.ndim() == 4 && frames.shape(1) == height && frames.shape(2) == width;
    if (!same || (frames.shape(3) != 2 && frames.shape(3) != 3)) {
      throw py::value_error("frames: expected shape [F, " + std::to_string(height) + ", " + std::to_string(width) +
                            ", 2 or 3], got " + shape_of(frames));
    }
    // the stride of an axis of length 1 may be any number
    if (frames.size() && (frames.strides(3) != 1 || (width > 1 && frames.strides(2) != frames.shape(3))))
      throw py::value_error("frames: expected the pixels of a row to be adjacent in memory");
    if (out.ndim() != 4 || out.shape(0) != frames.shape(0) || out.shape(1) != out_height || out.shape(2) != out_width ||
        out.shape(3) != 3 || !(out.flags() & py::array::c_style)) {
      throw py::value_error("out: expected a dense array of shape [" + std::to_string(frames.shape(0)) + ", " +
                            std::to_string(out_height) + ", " + std::to_string(out_width) + ", 3], got " +
                            shape_of(out));
    }
    const cpr::resize::Job job{
        frames.data(), frames.shape(0), frames.strides(0), frames.strides(1), static_cast<int>(frames.shape(3)),
        rows_.view(),  columns_.view(), out.mutable_data()};
    const char* error = cpr_cpu_variant_error();
    if (error == nullptr) {
      py::gil_scoped_release release;
      error = cpr::kernels().resize_frames(job);
    }
    if (error != nullptr) throw std::runtime_error(error);
  }

 private:
  cpr::AxisWeights rows_, columns_;

  std::array<int64_t, 4> sizes() const {
    const cpr::resize::Axis rows = rows_.view(), columns = columns_.view();
    return {rows.in, columns.in, rows.out, columns.out};
  }

  static Size checked(Size from, Size to) {
    for (const int64_t side : {from.first, from.second, to.first, to.second}) {
      if (side < 1 || side > kMostPixels) {
        throw py::value_error("from_size, to_size: expected sides of 1 to " + std::to_string(kMostPixels) +
                              " pixels, got " + std::to_string(side));
      }
    }
    return from;
  }

  static cpr::Filter filter_of(const std::string& name) {
    if (name == "bilinear") return cpr::Filter::kBilinear;
    if (name == "bicubic") return cpr::Filter::kBicubic;
    throw py::value_error("filter: expected bilinear or bicubic, got '" + name + "'");
  }
};

// The bytes of an object, for as long as the view lives.
class Bytes {
 public:
  explicit Bytes(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Bytes() {
    if (view_.obj != nullptr) PyBuffer_Release(&view_);
  }
  Bytes(Bytes&& other) noexcept : view_(std::exchange(other.view_, {})) {}
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  int64_t size() const { return view_.len; }

 private:
  Py_buffer view_;
};

// The conversion of 4:2:0 pictures of one kind of colours, which any number of threads use.
class Yuv420ToRgb {
 public:
  Yuv420ToRgb(double red, double blue, bool full_range) : factors_(checked(red, blue, full_range)) {}

  void operator()(const std::vector<std::array<py::object, 3>>& pictures, int64_t rows, int64_t top, int64_t left,
                  py::array_t<uint8_t>& out) const {
    const bool even = out.ndim() == 4 && out.shape(3) == 3 && out.shape(1) % 2 == 0 && out.shape(2) % 2 == 0;
    if (!even || out.shape(0) != static_cast<int64_t>(pictures.size()) ||
        (out.size() && (out.strides(3) != 1 || out.strides(2) != 3))) {
      throw py::value_error("out: expected even sides and adjacent pixels, [" + std::to_string(pictures.size()) +
                            ", H, W, 3], got shape " + shape_of(out));
    }
    if (rows < 2 || top < 0 || left < 0 || rows % 2 || top % 2 || left % 2) {
      throw py::value_error("rows, top, left: expected even numbers, from 2 and from 0 on, got " +
                            std::to_string(rows) + ", " + std::to_string(top) + ", " + std::to_string(left));
    }
    if (out.size() == 0) return;
    const int64_t height = out.shape(1), width = out.shape(2);
    std::vector<std::array<Bytes, 3>> held;
    std::vector<cpr::yuv_to_rgb::Job> jobs;
    held.reserve(pictures.size());
    jobs.reserve(pictures.size());
    for (const auto& [y, u, v] : pictures) {
      const auto& planes = held.emplace_back(std::array<Bytes, 3>{Bytes(y), Bytes(u), Bytes(v)});
      const auto plane = [&](int at) {
        const int64_t scale = at == 0 ? 1 : 2, size = planes[at].size(), stride = size / (rows / scale);
        const int64_t right = (left + width) / scale, bottom = (top + height) / scale;
        if (size % (rows / scale) || stride < right || rows / scale < bottom) {
          throw py::value_error("pictures: expected " + std::to_string(rows / scale) + " rows, from " +
                                std::to_string(bottom) + " on, of at least " + std::to_string(right) +
                                " bytes in plane " + std::to_string(at) + ", got " + std::to_string(size) + " bytes");
        }
        return cpr::yuv_to_rgb::Plane{planes[at].data() + top / scale * stride + left / scale, stride};
      };
      jobs.push_back({plane(0), plane(1), plane(2), height, width, factors_,
                      out.mutable_data(static_cast<int64_t>(jobs.size()), 0, 0, 0), out.strides(1)});
    }
    if (const char* error = cpr_cpu_variant_error()) throw std::runtime_error(error);
    py::gil_scoped_release release;
    for (const auto& job : jobs) cpr::kernels().convert_yuv420(job);
  }

 private:
  cpr::yuv_to_rgb::Factors factors_;

  static cpr::yuv_to_rgb::Factors checked(double red, double blue, bool full_range) {
    if (red > 0 && blue > 0 && red + blue < 1) return cpr::factors_of(red, blue, full_range);
    throw py::value_error("red, blue: expected weights above 0 whose sum is below 1, got " + std::to_string(red) +
                          ", " + std::to_string(blue));
  }
};

py::dict build_info() {
  py::dict info;
  info["version"] = CPR_VERSION;
  info["cpu_variant"] = cpr_cpu_variant();
  info["cpu_variants"] = cpr_cpu_variants();
#if defined(CPR_EMULATED_AVX512)
  info["cpu_variants_emulated"] = "avx512";
#endif
  info["cuda_architectures"] = cpr_cuda_architectures();
  info["cuda_version"] = cpr_cuda_version();
  info["cuda_oldest_driver"] = cpr_cuda_oldest_driver();
  info["compiler"] = CPR_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() =
      "Host code for NumPy users, without torch.\n\n"
      "philox(seed, counters)                   raw Philox4x32-10 words\n"
      "philox_uniform(seed, streams, blocks=1)  uniform draws as a pure function of (seed, stream)\n"
      "msgpack_spans(record)                    where the byte strings of a msgpack array lie\n"
      "Resize(from_size, to_size, filter)       an antialiased resize of frames of bytes\n"
      "Yuv420ToRgb(red, blue, full_range)       the conversion of boxes of 4:2:0 pictures to RGB\n"
      "build_info()                             what this build contains";
  module.def("philox", &philox, py::arg("seed"), py::arg("counters"),
             "Philox4x32-10 with the 64-bit key `seed`: uint32 [N, 4] counters -> uint32 [N, 4] words.");
  module.def(
      "philox_uniform", &philox_uniform, py::arg("seed"), py::arg("streams"), py::arg("blocks") = 1,
      "Independent uniforms in [0, 1) with 32 random bits each: uint64 [N, 3] streams (every value below 2**32,\n"
      "e.g. epoch, video, purpose) -> float64 [N, 4 * blocks]. Row i depends only on seed and streams[i], and\n"
      "more blocks extend a row without changing its beginning. Raises ValueError on another shape or value.");
  module.def(
      "msgpack_spans", &msgpack_spans, py::arg("record"),
      "uint64 [N, 2]: offset and size in bytes of each element of `record`, a buffer that holds a msgpack array of\n"
      "bytes, in the encoding of any msgpack version. No element is copied. Raises ValueError on anything else.");
  py::class_<Resize>(
      module, "Resize",
      "Resizes frames of bytes with an antialiased filter, in the fixed-point arithmetic of torch's\n"
      "`interpolate(antialias=True)`: the result is the same, bit for bit. Any number of threads may share it.")
      .def(py::init<Resize::Size, Resize::Size, const std::string&>(), py::arg("from_size"), py::arg("to_size"),
           py::arg("filter"),
           "(height, width) of the frames and of the result, in pixels; filter \"bilinear\" or \"bicubic\". Raises\n"
           "ValueError for another filter or a side that is not within 1..65536.")
      .def("__call__", &Resize::operator(), py::arg("frames").noconvert(), py::arg("out").noconvert(),
           "Writes frames, uint8 [F, H, W, C], to out, uint8 [F, H', W', 3]. C = 3, or 2: (u, v) becomes (128, v, u).\n"
           "The pixels of a row must be adjacent in memory; rows and frames need not be, but out must be dense.\n"
           "Raises ValueError for another shape or layout, TypeError for another type.");
  py::class_<Yuv420ToRgb>(module, "Yuv420ToRgb",
                          "Converts boxes of 4:2:0 pictures to RGB in the arithmetic of FFmpeg's swscale on x86, in "
                          "which every 2x2 pixels\n"
                          "share the nearest chroma sample. Any number of threads may share it.")
      .def(py::init<double, double, bool>(), py::arg("red"), py::arg("blue"), py::arg("full_range"),
           "The weights of red and blue in luma (K_R and K_B of ITU-T H.273), and whether levels range from 0 to 255 "
           "or\n"
           "as in television. Raises ValueError unless both weights are above 0 and their sum is below 1.")
      .def(
          "__call__", &Yuv420ToRgb::operator(), py::arg("pictures"), py::arg("rows"), py::arg("top"), py::arg("left"),
          py::arg("out").noconvert(),
          "Writes the box of each of F pictures whose first pixel is (top, left) to out, uint8 [F, H, W, 3]. A "
          "picture\n"
          "is the bytes of its planes Y, U and V, which have `rows`, rows / 2 and rows / 2 rows of equal length. All\n"
          "sides and the place of the box are even. Raises ValueError for another shape or layout, or if the box ends\n"
          "outside of a plane, TypeError for another type.");
  module.def(
      "build_info", &build_info,
      "dict: version, cpu_variant (the one in force), cpu_variants (best first) and cuda_architectures,\n"
      "comma-separated, cuda_version (\"\" without CUDA kernels), cuda_oldest_driver (int: the oldest NVIDIA driver\n"
      "for that version, 0 without) and compiler. Only in a build that emulates AVX-512 for tests:\n"
      "cpu_variants_emulated.");
}
