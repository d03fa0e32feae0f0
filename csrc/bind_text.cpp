// Python face of the figures of texts.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "block.hpp"
#include "text_stats.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

struct Field {
  const char* name;
  double cpt::TextMetrics::*value;
};

#define CPT_FIELD(name) \
  Field { #name, &cpt::TextMetrics::name }

constexpr Field kFields[] = {
    CPT_FIELD(bytes),
    CPT_FIELD(characters),
    CPT_FIELD(words),
    CPT_FIELD(lines),
    CPT_FIELD(sentences),
    CPT_FIELD(word_length_mean),
    CPT_FIELD(word_length_max),
    CPT_FIELD(line_length_mean),
    CPT_FIELD(sentence_length_mean),
    CPT_FIELD(sentence_length_max),
    CPT_FIELD(letter_share),
    CPT_FIELD(latin_share),
    CPT_FIELD(other_letter_share),
    CPT_FIELD(digit_share),
    CPT_FIELD(punctuation_share),
    CPT_FIELD(symbol_share),
    CPT_FIELD(control_share),
    CPT_FIELD(japanese_characters),
    CPT_FIELD(japanese_share),
    CPT_FIELD(hiragana_of_japanese),
    CPT_FIELD(katakana_of_japanese),
    CPT_FIELD(kanji_of_japanese),
    CPT_FIELD(hangul_share),
    CPT_FIELD(loose_jamo_share),
    CPT_FIELD(conjoining_jamo_share),
    CPT_FIELD(alphabetic_word_share),
    CPT_FIELD(stop_words),
    CPT_FIELD(ellipsis_sentence_share),
    CPT_FIELD(ellipsis_line_share),
    CPT_FIELD(bullet_line_share),
    CPT_FIELD(ended_line_share),
    CPT_FIELD(hash_word_ratio),
    CPT_FIELD(ellipsis_word_ratio),
    CPT_FIELD(link_share),
    CPT_FIELD(longest_run),
    CPT_FIELD(run_share),
    CPT_FIELD(duplicate_lines),
    CPT_FIELD(duplicate_line_characters),
    CPT_FIELD(duplicate_sentences),
    CPT_FIELD(duplicate_sentence_characters),
    CPT_FIELD(top_2gram),
    CPT_FIELD(top_3gram),
    CPT_FIELD(top_4gram),
    CPT_FIELD(repeated_5gram),
    CPT_FIELD(repeated_6gram),
    CPT_FIELD(repeated_7gram),
    CPT_FIELD(repeated_8gram),
    CPT_FIELD(repeated_9gram),
    CPT_FIELD(repeated_10gram),
    CPT_FIELD(top_2words),
    CPT_FIELD(top_3words),
    CPT_FIELD(top_4words),
    CPT_FIELD(repeated_5words),
    CPT_FIELD(repeated_6words),
    CPT_FIELD(repeated_7words),
    CPT_FIELD(repeated_8words),
    CPT_FIELD(repeated_9words),
    CPT_FIELD(repeated_10words),
};

#undef CPT_FIELD

// A figure that is not in the table would never be seen.
static_assert(std::size(kFields) * sizeof(double) == sizeof(cpt::TextMetrics));

using Names = std::vector<std::string>;

std::vector<Field> fields_of(const Names& wanted) {
  if (wanted.empty()) return {std::begin(kFields), std::end(kFields)};
  std::vector<Field> fields;
  for (const std::string& name : wanted) {
    const auto* field = std::find_if(std::begin(kFields), std::end(kFields),
                                     [&name](const Field& known) { return name == known.name; });
    if (field == std::end(kFields)) throw std::invalid_argument("no figure of the name " + name);
    fields.push_back(*field);
  }
  return fields;
}

bool any_ends_in(const std::vector<Field>& fields, const std::string& ending) {
  return std::any_of(fields.begin(), fields.end(), [&ending](const Field& field) {
    const std::string name = field.name;
    const bool counts = name.rfind("top_", 0) == 0 || name.rfind("repeated_", 0) == 0;
    return counts && name.substr(name.size() - std::min(name.size(), ending.size())) == ending;
  });
}

py::dict text_metrics(const cpt::Block& block, const Names& stop_words, const Names& wanted) {
  const std::vector<Field> fields = fields_of(wanted);
  std::vector<py::array_t<double>> columns;
  std::vector<double*> places;
  py::dict result;
  for (const Field& field : fields) {
    columns.emplace_back(static_cast<py::ssize_t>(block.size()));
    places.push_back(columns.back().mutable_data());
    result[field.name] = columns.back();
  }
  const py::gil_scoped_release released;
  cpt::TextMeter meter({stop_words.begin(), stop_words.end()}, any_ends_in(fields, "gram"),
                       any_ends_in(fields, "words"));
  for (std::size_t k = 0; k < block.size(); ++k) {
    const cpt::TextMetrics metrics = meter.measure(block.document(k));
    for (std::size_t column = 0; column < places.size(); ++column) places[column][k] = metrics.*fields[column].value;
  }
  return result;
}

Names metric_names() {
  Names names;
  for (const Field& field : kFields) names.emplace_back(field.name);
  return names;
}

}  // namespace

void bind_text(py::module_& module) {
  module.def("text_metrics", &text_metrics, py::arg("block"), py::arg("stop_words") = Names{},
             py::arg("wanted") = Names{});
  module.def("metric_names", &metric_names);
}
